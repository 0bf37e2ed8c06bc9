"""Where containers come from: what every engine has to do (`protocol`), LXC (`lxc`), and a fake for tests (`memory`)."""
