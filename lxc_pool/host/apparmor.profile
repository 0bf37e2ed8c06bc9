# Made by `lxc-pool setup`, which writes it anew.
#
# For the root of unprivileged containers. It stands behind their user namespaces: mounts are as free as the kernel lets
# them be there, so that systemd comes up; what is denied are the switches of the machine at the places where programs
# look for them, other profiles, and what is outside of the container. Kernels before 6.7 are said not to ask about mounts
# by the newer calls (move_mount) at all, which was not tried: no rule here is to be the only wall.
#
# Its name begins with lxc-: the profile of lxc-start lets it change to no other.

# Without what is newer, the network above all, of which all would be allowed: where Linux 6.1 is to decide about sockets,
# it refuses to lock any (measured), as systemd does for DynamicUser=. Network namespaces keep them in.
abi <abi/kernel-5.4-vanilla>,

#include <tunables/global>

# The root directory, and where systemd puts a service's own together.
@{lxc_pool_roots}=/ /run/systemd/unit-root/

profile lxc-pool-container flags=(attach_disconnected,mediate_deleted) {
  # As the container's namespaces, ids and capabilities let it. Executing keeps to this profile, and no rule here
  # changes to another.
  file,
  capability,
  mount,
  remount,
  umount,
  pivot_root,

  # To its like only; which of them it sees is decided by its namespaces. What is done to it from outside is for the
  # profile of whoever does it.
  signal (send) peer=@{profile_name},
  signal (receive),
  ptrace (read, trace) peer=@{profile_name},
  ptrace (readby, tracedby),

  # Nothing that a user namespace confines.
  deny capability mac_admin,
  deny capability mac_override,
  deny capability sys_module,
  deny capability sys_rawio,

  # One each for the whole machine.
  deny mount fstype=configfs,
  deny mount fstype=debugfs,
  deny mount fstype=efivarfs,
  deny mount fstype=pstore,
  deny mount fstype=securityfs,
  deny mount fstype=tracefs,

  deny /dev/{mem,kmem,port} rwklm,

  deny @{lxc_pool_roots}proc/{kcore,kpagecount,kpageflags,kpagecgroup} rwklm,
  deny @{lxc_pool_roots}proc/sysrq-trigger rwkl,
  deny @{lxc_pool_roots}proc/{acpi,bus,driver,fs,irq,scsi,tty}/** wkl,
  deny @{lxc_pool_roots}proc/{latency_stats,mtrr,timer_stats} wkl,

  # Of /proc/sys, what belongs to namespaces: fs/mqueue, net, user; in kernel: domainname, hostname, msg*, sem*, shm*.
  # A rule for each way in which a name differs from these, for there are no exceptions to a denial.
  deny @{lxc_pool_roots}proc/sys/{[^fknu]*,f[^s]*,fs?*,k[^e]*,ke[^r]*,ker[^n]*,kern[^e]*,kerne[^l]*,kernel?*}{,/**} wkl,
  deny @{lxc_pool_roots}proc/sys/{n[^e]*,ne[^t]*,net?*,u[^s]*,us[^e]*,use[^r]*,user?*}{,/**} wkl,
  deny @{lxc_pool_roots}proc/sys/fs/{[^m]*,m[^q]*}{,/**} wkl,
  deny @{lxc_pool_roots}proc/sys/kernel/{[^dhms]*,d[^o]*,do[^m]*,h[^o]*,ho[^s]*,m[^s]*,s[^eh]*,se[^m]*,sh[^m]*}{,/**} wkl,

  # Of /sys, what belongs to namespaces: fs/cgroup, devices/virtual/net.
  deny @{lxc_pool_roots}sys/{[^df]*,d[^e]*,de[^v]*,dev,dev[^i]*,f[^s]*,fs?*}{,/**} wkl,
  deny @{lxc_pool_roots}sys/fs/{[^c]*,c[^g]*}{,/**} wkl,
  deny @{lxc_pool_roots}sys/devices/{[^v]*,v[^i]*}{,/**} wkl,
  deny @{lxc_pool_roots}sys/devices/virtual/{[^n]*,n[^e]*,ne[^t]*}{,/**} wkl,
  deny @{lxc_pool_roots}sys/kernel/{debug,security,tracing}/{,**} rwklm,
  deny @{lxc_pool_roots}sys/firmware/efi/efivars/** rwklm,
}
