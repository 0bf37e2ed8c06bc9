"""What the host has: its requirements, control groups, mounts, and the residue that containers leave."""
