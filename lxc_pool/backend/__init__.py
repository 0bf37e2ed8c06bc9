"""Where containers come from: what an engine has to do (`protocol`), LXC (`lxc`), a fake for tests (`memory`)."""
