"""Base images: immutable, versioned root file systems that containers are cloned from."""
