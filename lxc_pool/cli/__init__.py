"""The `lxc-pool` program: `main` parses and gives exit statuses; each group of commands has a module."""
