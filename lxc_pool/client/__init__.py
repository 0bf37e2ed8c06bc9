"""The client's side of lxc_pool: light, without liblxc and without the service."""
