/* What an attacker inside a container tries; `attack WHAT` prints `key=value` words, one line for each try.

   Built statically by the tests, as a busybox container has no libraries. Every try is one system call or few, so
   that what is refused is the call itself, and not a program's own second thoughts. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dqblk_xfs.h>
#include <linux/fs.h>
#include <linux/if_packet.h>
#include <linux/keyctl.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/quota.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void say(const char *what, long result) {
    printf("%s=%s\n", what, result < 0 ? strerrorname_np(errno) : "ok");
    fflush(stdout);
}

/* Hold what was taken until somebody closes standard input. */
static void hold(void) {
    char byte;
    while (read(0, &byte, 1) > 0) {
    }
}

static int calls(void) {
    char image[16] = "no module";
    say("init_module", syscall(SYS_init_module, image, sizeof image, ""));
    say("finit_module", syscall(SYS_finit_module, open("/dev/null", O_RDONLY), "", 0));
    say("delete_module", syscall(SYS_delete_module, "loop", O_NONBLOCK));
    say("kexec_load", syscall(SYS_kexec_load, 0L, 0L, NULL, 0L));
    say("kexec_file_load", syscall(SYS_kexec_file_load, -1, -1, 0L, "", 0L));
    struct { struct file_handle head; char id[8]; } handle = {{8, 1}, {2}};
    say("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, &handle, O_RDONLY));
    say("reboot", syscall(SYS_reboot, 0xfee1dead, 672274793, 0x89abcdef, NULL));
    struct timespec now = {0, 0};
    say("clock_settime", clock_settime(CLOCK_REALTIME, &now));
    say("swapon", syscall(SYS_swapon, "/dev/zero", 0));
    say("syslog", syscall(SYS_syslog, 5, NULL, 0));
    say("iopl", syscall(SYS_iopl, 3));
    say("add_key", syscall(SYS_add_key, "user", "k", "v", 1L, KEY_SPEC_PROCESS_KEYRING));
    say("keyctl", syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_USER_KEYRING, 1));
    say("request_key", syscall(SYS_request_key, "user", "k", NULL, KEY_SPEC_PROCESS_KEYRING));
    say("umount_force", umount2("/proc", MNT_FORCE));
    say("mknod_disk", mknod("/disk", S_IFBLK | 0666, makedev(8, 0)));
    say("mknod_kmsg", mknod("/kmsg", S_IFCHR | 0666, makedev(1, 11)));
    say("setns_own_init", setns(open("/proc/1/ns/user", O_RDONLY), CLONE_NEWUSER));
    struct rlimit limit = {1 << 30, 1 << 30};
    say("raise_nofile", setrlimit(RLIMIT_NOFILE, &limit));
    say("nice", setpriority(PRIO_PROCESS, 0, -20));
    say("oom_score_adj", write(open("/proc/self/oom_score_adj", O_WRONLY), "-1000", 5));
    
    return 0;
}

static int files(int count, char **paths) {
    for (int i = 0; i < count; i++) {
        int fd = open(paths[i], O_WRONLY | O_NONBLOCK | O_NOCTTY);
        char what[512];
        snprintf(what, sizeof what, "open %s", paths[i]);
        say(what, fd);
        if (fd >= 0) close(fd);
    }
    return 0;
}

static int inotify(long most) {
    long made = 0;
    while (made < most && inotify_init1(0) >= 0) made++;
    printf("inotify=%ld %s\n", made, made < most ? strerrorname_np(errno) : "ok");
    fflush(stdout);
    hold();
    return 0;
}

static int descriptors(void) {
    long made = 0;
    while (open("/dev/null", O_RDONLY) >= 0) made++;
    printf("descriptors=%ld %s\n", made, strerrorname_np(errno));
    fflush(stdout);
    hold();
    return 0;
}

/* Each child takes what a process may have; that many children. */
static int many_descriptors(int children) {
    long total = 0;
    for (int i = 0; i < children; i++) {
        int ends[2];
        if (pipe(ends)) break;
        if (fork() == 0) {
            long made = 0;
            while (open("/dev/null", O_RDONLY) >= 0) made++;
            if (write(ends[1], &made, sizeof made)) {}
            pause();
        }
        close(ends[1]);
        long made = 0;
        if (read(ends[0], &made, sizeof made) > 0) total += made;
        close(ends[0]);
    }
    printf("descriptors=%ld\n", total);
    fflush(stdout);
    hold();
    kill(0, 9);
    return 0;
}

static int memory(void) {
    for (long mib = 1;; mib++) {
        char *block = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block == MAP_FAILED) break;
        memset(block, 1, 1 << 20);
        printf("mib=%ld\n", mib);
        fflush(stdout);
    }
    return 0;
}

static int forks(void) {
    long made = 0;
    pid_t child;
    while ((child = fork()) > 0) made++;
    if (child == 0) {
        pause();
        _exit(0);
    }
    printf("forks=%ld %s\n", made, strerrorname_np(errno));
    fflush(stdout);
    hold();
    return 0;
}

/* Users of the container, each with what a user may have of keys. */
static int keyrings(void) {
    static char payload[1000];
    long keys = 0;
    for (int uid = 1; uid < 50; uid++) {
        if (fork() == 0) {
            int mine = 0;
            if (setresuid(uid, uid, uid)) _exit(0);
            for (int i = 0; i < 50; i++) {
                char name[32];
                snprintf(name, sizeof name, "k%d", i);
                mine += syscall(SYS_add_key, "user", name, payload, sizeof payload, KEY_SPEC_USER_KEYRING) >= 0;
            }
            _exit(mine);
        }
        int status;
        wait(&status);
        keys += WEXITSTATUS(status);
    }
    printf("keys=%ld\n", keys);
    return 0;
}

static int namespaces(void) {
    long made = 0;
    while (made < 5000 && unshare(CLONE_NEWNET) == 0) {
        char path[32];
        snprintf(path, sizeof path, "/proc/self/ns/net");
        if (open(path, O_RDONLY) < 0) break;
        made++;
    }
    printf("netns=%ld %s\n", made, strerrorname_np(errno));
    return 0;
}

static int cgroups(int count, char **parents) {
    for (int i = 0; i < count; i++) {
        long made = 0;
        char path[256];
        for (; made < 5000; made++) {
            snprintf(path, sizeof path, "%s/x%ld", parents[i], made);
            if (mkdir(path, 0755)) break;
        }
        printf("%s=%ld %s\n", parents[i], made, made < 5000 ? strerrorname_np(errno) : "ok");
        fflush(stdout);
        while (made--) {
            snprintf(path, sizeof path, "%s/x%ld", parents[i], made);
            rmdir(path);
        }
    }
    return 0;
}

static int abstract(const char *name, int listening) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(name);
    memcpy(address.sun_path + 1, name, length);
    socklen_t size = offsetof(struct sockaddr_un, sun_path) + 1 + length;
    int sock = socket(AF_UNIX, SOCK_STREAM, 0);
    if (listening) {
        say("bind", bind(sock, (struct sockaddr *)&address, size));
        listen(sock, 5);
        hold();
        return 0;
    }
    say("connect", connect(sock, (struct sockaddr *)&address, size));
    return 0;
}

/* Send frames, each written in hexadecimal, as they are. */
static int frames(const char *device, int count, char **texts) {
    int sock = socket(AF_PACKET, SOCK_RAW, 0);
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(device)};
    say("bind", bind(sock, (struct sockaddr *)&address, sizeof address));
    for (int i = 0; i < count; i++) {
        unsigned char frame[2048];
        size_t length = 0;
        for (char *digit = texts[i]; digit[0] && digit[1] && length < sizeof frame; digit += 2) {
            unsigned byte;
            sscanf(digit, "%2x", &byte);
            frame[length++] = (unsigned char)byte;
        }
        say("send", send(sock, frame, length, 0));
    }
    return 0;
}

/* A datagram to each of so many ports. */
static int datagrams(const char *host, int count) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(host)};
    int sock = socket(AF_INET, SOCK_DGRAM, 0);
    long sent = 0;
    for (int i = 0; i < count; i++) {
        address.sin_port = htons((unsigned short)(10000 + i));
        sent += sendto(sock, "x", 1, 0, (struct sockaddr *)&address, sizeof address) == 1;
    }
    printf("sent=%ld\n", sent);
    return 0;
}

static int terminal(void) {
    for (int fd = 0; fd < 3; fd++) {
        char what[32], byte = 'x';
        snprintf(what, sizeof what, "tiocsti%d", fd);
        say(what, ioctl(fd, TIOCSTI, &byte));
    }
    int tty = open("/dev/tty", O_RDWR | O_NOCTTY);
    say("tty", tty);
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    say("console", console);
    return 0;
}

/* Catch whoever comes in: for *seconds*, try to trace every process of /proc, and to open what it holds. Anything got
   of a process whose program is not the container's is a find. */
static int lurk(int seconds) {
    struct timespec end, now;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += seconds;
    long looks = 0, seen = 0, foreign = 0;
    printf("lurking\n");
    fflush(stdout);
    do {
        DIR *proc = opendir("/proc");
        struct dirent *entry;
        while ((entry = readdir(proc))) {
            int pid = atoi(entry->d_name);
            if (pid <= 1 || pid == getpid()) continue;
            char path[300], target[300];
            struct stat ours;
            looks++;
            snprintf(path, sizeof path, "/proc/%d/exe", pid);
            ssize_t n = readlink(path, target, sizeof target - 1);
            if (n < 0) {
                seen += errno == EACCES;  /* it is there, and closed to us */
                snprintf(path, sizeof path, "/proc/%d/mem", pid);
                int mem = open(path, O_RDWR);
                snprintf(path, sizeof path, "/proc/%d/fd", pid);
                DIR *fds = opendir(path);
                long traced = ptrace(PTRACE_SEIZE, pid, NULL, NULL);
                /* it may have become the container's own in between: then none of this is a find */
                snprintf(path, sizeof path, "/proc/%d/exe", pid);
                if ((mem >= 0 || fds || traced == 0) && readlink(path, target, sizeof target - 1) < 0 && errno == EACCES)
                    foreign++;
                if (traced == 0) {  /* let go of it at once: who waits for it would wait for us */
                    ptrace(PTRACE_INTERRUPT, pid, NULL, NULL);
                    waitpid(pid, NULL, __WALL);
                    ptrace(PTRACE_DETACH, pid, NULL, NULL);
                }
                if (mem >= 0) close(mem);
                if (fds) closedir(fds);
                continue;
            }
            target[n] = 0;
            /* a program that this file system does not have is the host's */
            if (strstr(target, "python") || (stat(target, &ours) && !strstr(target, "(deleted)"))) foreign++;
        }
        closedir(proc);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec < end.tv_sec);
    printf("looks=%ld\nclosed=%ld\nforeign=%ld\n", looks, seen, foreign);
    return 0;
}

/* A user namespace of its own gives root all capabilities in it: what is that good for? */
static int nested(void) {
    say("unshare_user", unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWCGROUP));
    say("remount_proc", mount(NULL, "/proc", NULL, MS_REMOUNT | MS_BIND, NULL));
    say("raise_inotify", write(open("/proc/sys/user/max_inotify_instances", O_WRONLY), "9999", 4));
    say("mknod_disk", mknod("/tmp/disk", S_IFBLK | 0666, makedev(8, 0)));
    say("remount_dev", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    long made = 0;
    while (made < 1000 && inotify_init1(0) >= 0) made++;
    printf("inotify=%ld %s\n", made, strerrorname_np(errno));
    return 0;
}

/* Raise a hard limit of a process, of all by one and for good; that of file locks is what strays are known by. */
static void raise_locks(const char *what, pid_t pid) {
    struct rlimit limit;
    char name[64];
    getrlimit(RLIMIT_LOCKS, &limit);
    struct rlimit by_one = {limit.rlim_cur, limit.rlim_max + 1}, none = {RLIM_INFINITY, RLIM_INFINITY};
    snprintf(name, sizeof name, "%s_by_one", what);
    say(name, prlimit(pid, RLIMIT_LOCKS, &by_one, NULL));
    snprintf(name, sizeof name, "%s_for_good", what);
    say(name, prlimit(pid, RLIMIT_LOCKS, &none, NULL));
}

static int unmark(void) {
    pid_t child;
    raise_locks("itself", 0);
    if (!(child = fork())) pause();
    raise_locks("a_child", child);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    if (!(child = fork())) {
        setsid();
        if (!(child = fork())) raise_locks("a_daemon", 0);
        waitpid(child, NULL, 0);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    if (!(child = fork())) {
        uid_t uid = geteuid();
        say("unshare", unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS));
        int map = open("/proc/self/uid_map", O_WRONLY);
        dprintf(map, "0 %d 1", uid);
        if (!(child = fork())) raise_locks("a_nested_root", 0);
        waitpid(child, NULL, 0);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    struct rlimit lower = {5, 5};
    say("lower", setrlimit(RLIMIT_LOCKS, &lower));
    raise_locks("a_lower_one", 0);
    return 0;
}

static int streams(void) {
    for (int fd = 0; fd < 256; fd++) {
        char path[64], target[256];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n < 0) continue;
        target[n] = 0;
        snprintf(path, sizeof path, "/proc/self/fd/%d/", fd);
        int directory = open(path, O_RDONLY | O_DIRECTORY);
        printf("fd%d=%s %s\n", fd, target, directory < 0 ? strerrorname_np(errno) : "a directory");
    }
    return 0;
}

#ifndef SYS_open_tree
#define SYS_open_tree 428
#define SYS_move_mount 429
#define SYS_mount_setattr 442
#endif

struct attributes { unsigned long long set, clear, propagation, user_namespace; };

static long change(int directory, const char *path, unsigned long long clear) {
    struct attributes wanted = {0, clear, 0, 0};
    return syscall(SYS_mount_setattr, directory, path, *path ? 0 : AT_EMPTY_PATH, &wanted, sizeof wanted);
}

/* Change what is fixed about a mount, by every call that can. */
static void loosen(const char *where, const char *path) {
    static const struct { const char *name; unsigned long flag; } flags[] = {
        {"rdonly", MS_RDONLY}, {"nosuid", MS_NOSUID}, {"nodev", MS_NODEV}};
    char what[128];
    for (int i = 0; i < 3; i++) {
        unsigned long others = (MS_RDONLY | MS_NOSUID | MS_NODEV) & ~flags[i].flag;
        snprintf(what, sizeof what, "%s_remount_%s", where, flags[i].name);
        say(what, mount(NULL, path, NULL, MS_REMOUNT | MS_BIND | others, NULL));
        snprintf(what, sizeof what, "%s_setattr_%s", where, flags[i].name);
        say(what, change(AT_FDCWD, path, flags[i].flag));
        int tree = syscall(SYS_open_tree, AT_FDCWD, path, 1 /* OPEN_TREE_CLONE */);
        snprintf(what, sizeof what, "%s_clone_%s", where, flags[i].name);
        say(what, tree < 0 ? -1 : change(tree, "", flags[i].flag));
    }
    snprintf(what, sizeof what, "%s_superblock", where);
    say(what, mount(NULL, path, NULL, MS_REMOUNT, NULL));
    /* Whose files these are: seen through a user namespace of the attacker's own. */
    struct attributes owners = {0x00100000 /* MOUNT_ATTR_IDMAP */, 0, 0, open("/proc/self/ns/user", O_RDONLY)};
    int tree = syscall(SYS_open_tree, AT_FDCWD, path, 1);
    snprintf(what, sizeof what, "%s_owners", where);
    say(what, tree < 0 ? -1 : syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &owners, sizeof owners));
}

static int loosened(const char *path) {
    loosen("plain", path);
    mkdir("/elsewhere", 0755);
    close(open("/elsewhere.file", O_CREAT | O_WRONLY, 0644));
    struct stat status;
    const char *other = stat(path, &status) == 0 && S_ISDIR(status.st_mode) ? "/elsewhere" : "/elsewhere.file";
    if (mount(path, other, NULL, MS_BIND, NULL) == 0) loosen("bound", other);
    if (unshare(CLONE_NEWNS) == 0) loosen("namespace", path);
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0) loosen("nested", path);
    return 0;
}

static int effective(void) {
    printf("uid=%d\n", (int)geteuid());
    return 0;
}

/* Take one's files out of their quota, or make them stay for ever. */
static int projects(const char *path) {
    struct fsxattr attributes;
    int flags = 0, file = open(path, O_RDONLY | O_CREAT, 0600), directory = open("/", O_RDONLY | O_DIRECTORY);
    say("get", ioctl(directory, FS_IOC_FSGETXATTR, &attributes));
    printf("project=%u\ninherited=%s\n", attributes.fsx_projid, attributes.fsx_xflags & FS_XFLAG_PROJINHERIT ? "ok" : "no");
    attributes.fsx_projid += 65536;
    say("another", ioctl(directory, FS_IOC_FSSETXATTR, &attributes));
    attributes.fsx_projid = 0;
    say("none", ioctl(directory, FS_IOC_FSSETXATTR, &attributes));
    say("get", ioctl(directory, FS_IOC_FSGETXATTR, &attributes));
    attributes.fsx_xflags &= ~FS_XFLAG_PROJINHERIT;
    say("uninherited", ioctl(directory, FS_IOC_FSSETXATTR, &attributes));
    ioctl(directory, FS_IOC_GETFLAGS, &flags);
    flags &= ~FS_PROJINHERIT_FL;
    say("unflagged", ioctl(directory, FS_IOC_SETFLAGS, &flags));
    say("get", ioctl(file, FS_IOC_FSGETXATTR, &attributes));
    attributes.fsx_projid = 0;
    say("files-none", ioctl(file, FS_IOC_FSSETXATTR, &attributes));
    for (int immutable = 0; immutable < 2; immutable++) {
        ioctl(file, FS_IOC_GETFLAGS, &flags);
        flags |= immutable ? FS_IMMUTABLE_FL : FS_APPEND_FL;
        say(immutable ? "immutable" : "append-only", ioctl(file, FS_IOC_SETFLAGS, &flags));
    }
    struct fs_disk_quota limits = {.d_version = FS_DQUOT_VERSION, .d_flags = FS_PROJ_QUOTA, .d_fieldmask = FS_DQ_BHARD};
    say("limit", syscall(SYS_quotactl_fd, directory, QCMD(Q_XSETQLIM, 2), attributes.fsx_projid, &limits));
    say("off", syscall(SYS_quotactl_fd, directory, QCMD(Q_XQUOTAOFF, 2), 0, &flags));
    return 0;
}

/* Write to a file through memory until the kernel has no room for a page of it. */
static int mapped(const char *path, long size) {
    int file = open(path, O_RDWR | O_CREAT, 0600), status;
    say("truncate", ftruncate(file, size));
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (fork() == 0) {
        for (long at = 0; at < size; at += 4096) memory[at] = 1;
        _exit(0);
    }
    wait(&status);
    printf("signal=%d\n", WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    return 0;
}

/* Make a chain of so many directories with the longest names, as far as it goes. */
static int deep(const char *path, long levels) {
    char name[256] = {0};
    memset(name, 'd', 255);
    say("top", mkdir(path, 0700));
    int directory = open(path, O_RDONLY | O_DIRECTORY);
    long level = 0;
    for (; level < levels; level++) {
        int below = mkdirat(directory, name, 0700) ? -1 : openat(directory, name, O_RDONLY | O_DIRECTORY);
        if (below < 0) break;
        close(directory);
        directory = below;
    }
    printf("levels=%ld\n", level);
    return 0;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "calls")) return calls();
    if (!strcmp(what, "files")) return files(argc - 2, argv + 2);
    if (!strcmp(what, "inotify")) return inotify(argc > 2 ? atol(argv[2]) : 100000);
    if (!strcmp(what, "descriptors")) return descriptors();
    if (!strcmp(what, "many-descriptors")) return many_descriptors(atoi(argv[2]));
    if (!strcmp(what, "memory")) return memory();
    if (!strcmp(what, "forks")) return forks();
    if (!strcmp(what, "keyrings")) return keyrings();
    if (!strcmp(what, "namespaces")) return namespaces();
    if (!strcmp(what, "cgroups")) return cgroups(argc - 2, argv + 2);
    if (!strcmp(what, "connect")) return abstract(argv[2], 0);
    if (!strcmp(what, "listen")) return abstract(argv[2], 1);
    if (!strcmp(what, "frames")) return frames(argv[2], argc - 3, argv + 3);
    if (!strcmp(what, "datagrams")) return datagrams(argv[2], atoi(argv[3]));
    if (!strcmp(what, "terminal")) return terminal();
    if (!strcmp(what, "lurk")) return lurk(atoi(argv[2]));
    if (!strcmp(what, "nested")) return nested();
    if (!strcmp(what, "loosen")) return loosened(argv[2]);
    if (!strcmp(what, "effective")) return effective();
    if (!strcmp(what, "projects")) return projects(argv[2]);
    if (!strcmp(what, "map")) return mapped(argv[2], atol(argv[3]));
    if (!strcmp(what, "deep")) return deep(argv[2], atol(argv[3]));
    if (!strcmp(what, "unmark")) return unmark();
    if (!strcmp(what, "streams")) return streams();
    fprintf(stderr, "attack: nothing called '%s'\n", what);
    return 2;
}
