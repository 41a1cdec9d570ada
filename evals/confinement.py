"""The layers that confine a sandboxed program: namespaces, identity, file system, limits, system-call filter.

Loaded by path into the jail process (see `evals/jail.py`, whose docstring says who runs what); standard library only.
Each layer is tried and reported, none is required, and each hostile case is meant to be stopped by more than one:

- private network, process, IPC and mount namespaces, by way of a user namespace when not started by root;
- a root directory that holds only the read-only standard and system libraries, /dev/null and /dev/urandom, no /proc,
  and a small memory disk as working directory, new for every job (else: an emptied temporary directory);
- when root: an uid made of a process number, which nothing else uses, so that limits and kills count nobody else's;
- resource limits, no_new_privs, no capabilities, no core dumps or tracing, death with the parent;
- a system-call filter (no sockets, signals, tracing, exec, mounts) that needs no privilege at all.

After each job everything it started is killed: process 1 kills all others of its namespace; else a process under the
job's uid kills all of that uid; else orphans, which fall to the server as subreaper, are killed in a loop.

Without `private_root` a program can read world-readable files, write nothing (a file size limit of 0), and leave empty
files in world-writable directories.
Numbers in calls below are Linux's own: prctl(2), mount(2), unshare(2), seccomp(2), capset(2).
"""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import time

JOB_DIRECTORY = "/job"


class Kernel:
    """The C library calls that Python does not offer; each returns whether the kernel agreed."""

    def __init__(self):
        self.library = ctypes.CDLL(None, use_errno=True)

    def call(self, name, *args):
        function = getattr(self.library, name, None)
        return function is not None and function(*args) == 0

    def prctl(self, option, *args):
        return self.call("prctl", option, *[ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]])

    def mount(self, source, target, kind, flags, options=""):
        texts = [os.fsencode(text) for text in (source, target, kind, options)]
        return self.call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])

    def drop_capabilities(self):
        return self.call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


# Refused system calls: numbers on x86_64 and on aarch64.
DENIED = dict(
    socket=(41, 198), ptrace=(101, 117), process_vm_readv=(310, 270), process_vm_writev=(311, 271), kill=(62, 129),
    tkill=(200, 130), tgkill=(234, 131), rt_sigqueueinfo=(129, 138), rt_tgsigqueueinfo=(297, 240),
    pidfd_send_signal=(424, 424), unshare=(272, 97), setns=(308, 268), mount=(165, 40), umount2=(166, 39),
    pivot_root=(155, 41), chroot=(161, 51), io_uring_setup=(425, 425), bpf=(321, 280), keyctl=(250, 219),
    add_key=(248, 217), request_key=(249, 218), perf_event_open=(298, 241), userfaultfd=(323, 282), execve=(59, 221),
    execveat=(322, 281), shmget=(29, 194), msgget=(68, 186), semget=(64, 190), mq_open=(240, 180),
    prlimit64=(302, 261), setpriority=(141, 140),
)  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def syscall_filter(kernel):
    """Installs the seccomp filter for good; returns whether it is in force (it is not on other processors)."""
    column, architecture = MACHINES.get(os.uname().machine, (None, None))
    if column is None:
        return False
    kill, refuse, allow = (6, 0, 0, 0x80000000), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)
    rules = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), kill, (0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), refuse]
    for numbers in DENIED.values():
        rules += [(0x15, 0, 1, numbers[column]), refuse]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in [*rules, allow]))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules) + 1, ctypes.addressof(code)))
    return kernel.prctl(22, 2, ctypes.addressof(header))


def become(uid):
    """Takes on an uid and gid, and no groups, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def limit(limits):
    """Sets each named resource limit, or the present hard limit where that is lower; returns True."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    return True


def remove(folder):
    """Deletes a folder, with all that a program locked in it; raises OSError if something is not ours to delete."""
    shutil.rmtree(folder, onerror=_unlock)


def _unlock(function, path, error):
    os.chmod(os.path.dirname(path), 0o700)
    if os.path.isdir(path) and not os.path.islink(path):
        os.chmod(path, 0o700)
        remove(path)
    elif os.path.lexists(path):
        os.unlink(path)


class Confinement:
    """What keeper, server and jobs know of the layers: what was asked for, and how each turned out."""

    def __init__(self, config):
        self.config, self.kernel, self.layers = config, Kernel(), {}
        self.uid = None  # the jobs' uid, where it can differ from the server's
        self.directory = os.path.join(config["base"], "job")

    def attempt(self, layer, action):
        """Records whether `action` worked; a layer that was disabled, refused or is unknown here is False."""
        try:
            self.layers[layer] = layer not in self.config["disabled"] and bool(action())
        except (OSError, ValueError, AttributeError):
            self.layers[layer] = False
        return self.layers[layer]

    def enter_namespaces(self):
        """Keeper only: leaves the network, IPC, mount and process namespaces, for the server to be forked into."""
        self.config["number"] = os.getpid()
        self.kernel.prctl(36, 1)  # orphans fall to this process
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, the kernel should take a job first
        if os.geteuid() != 0:
            self.attempt("user_namespace", self._user_namespace)
        for layer, flag in dict(private_network=1 << 30, private_ipc=1 << 27, private_mounts=1 << 17).items():
            self.attempt(layer, lambda flag=flag: self.kernel.call("unshare", flag))
        self.attempt("private_processes", lambda: self.kernel.call("unshare", 1 << 29))

    def _user_namespace(self):
        uid, gid = os.geteuid(), os.getegid()
        if not self.kernel.call("unshare", 1 << 28):
            return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return True

    def enter_root(self):
        """Server only: what is to be done once, before the first job."""
        self.kernel.prctl(1, signal.SIGKILL)
        self.kernel.prctl(4, 0)
        self.kernel.prctl(36, 1)
        if os.geteuid() == 0:
            os.chmod(self.config["base"], 0o711)  # the jobs' uid must pass through
        self.attempt("unprivileged_uid", self.choose_uid)
        if not self.attempt("private_root", self.private_root):
            self.config["limits"]["RLIMIT_FSIZE"] = 0  # no memory disk, so programs share the caller's: nothing written

    def choose_uid(self):
        """Finds an uid that is nobody's: made of a process number, so that no other sandbox has the same one."""
        if os.geteuid() != 0:
            return False
        for uid in (900_000_000 + self.config["number"], 61_000 + self.config["number"] % 4_000):
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(OSError):
                    become(uid)
                    os._exit(0)
                os._exit(1)
            if os.waitpid(pid, 0)[1] == 0:
                self.uid = uid
                return True
        return False

    def private_root(self):
        """Makes the standard library and an empty directory the whole file system; returns whether that worked.

        Any refusal leaves the old root in place. All mounts are made in a private mount namespace: without one, or
        without a way to find stray processes when /proc is gone, nothing is attempted.
        """
        if not self.layers["private_mounts"] or not (self.layers["private_processes"] or self.uid):
            return False
        kernel, base = self.kernel, self.config["base"]
        if not kernel.mount("none", "/", "", 0x44000) or not kernel.mount("none", base, "tmpfs", 6, "size=1m,mode=755"):
            return False  # 0x44000 = private, recursive: from here on no mount is seen outside
        if not self._bind_libraries(base):
            return False
        os.makedirs(base + "/dev")
        for path in ("/dev/null", "/dev/urandom"):
            os.close(os.open(base + path, os.O_CREAT | os.O_WRONLY))
            if not kernel.mount(path, base + path, "", 0x1000):
                return False
        os.mkdir(base + JOB_DIRECTORY)
        os.chdir(base)
        if not kernel.call("pivot_root", b".", b".") or not kernel.call("umount2", b".", 2):
            raise SystemExit("evals/jail.py: the new root was refused half way; pass disable=('private_root',)")
        os.chdir("/")
        self.directory = JOB_DIRECTORY
        return kernel.mount("none", "/", "", 0x27)  # remounted read-only, without devices or set-uid

    def _bind_libraries(self, base):
        """Mounts the folders that imports need below `base`, read-only; returns whether all were accepted."""
        library = os.path.dirname(os.path.dirname(os.__file__))
        folders = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", library, *sys.path}
        for path in sorted(path for path in folders if os.path.isdir(path)):
            target = base + path
            if os.path.islink(path):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.symlink(os.readlink(path), target)
            elif not os.path.exists(target):  # a folder inside one that is there already
                os.makedirs(target)
                kept = os.statvfs(path).f_flag & (4 | 8 | 1024 | 2048)  # flags that must not be lost in a remount
                if not all(self.kernel.mount(path, target, "", flags) for flags in (0x1000, 0x1023 | kept)):
                    return False  # bound, then bound again read-only
        return True

    def fresh_directory(self):
        """Gives the next job an empty working directory: a new memory disk, else an emptied folder."""
        if self.layers["private_root"]:
            self.kernel.call("umount2", JOB_DIRECTORY.encode(), 2)
            owner = 65534 if self.uid is None else self.uid
            options = f"size=4m,nr_inodes=256,mode=700,uid={owner},gid={owner}"
            if not self.kernel.mount("none", JOB_DIRECTORY, "tmpfs", 6, options):
                raise SystemExit("evals/jail.py: no memory disk for the job; pass disable=('private_root',)")
            return
        if os.path.isdir(self.directory):
            remove(self.directory)
        os.mkdir(self.directory, 0o700)
        if self.uid is not None:
            os.chown(self.directory, self.uid, self.uid)

    def confine(self, channel, null):
        """Job only: gives up everything but the working directory and one pipe (as descriptor 3)."""
        os.setsid()
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.dup2(channel, 3)  # after the others: 3 may be what `null` was
        os.closerange(4, 65_536)
        os.chdir(self.directory)
        if self.uid is not None:
            become(self.uid)
        kernel = self.kernel
        self.attempt("rlimits", lambda: limit(self.config["limits"]))
        self.attempt("no_capabilities", kernel.drop_capabilities)
        self.attempt("die_with_parent", lambda: kernel.prctl(1, signal.SIGKILL))
        self.attempt("not_dumpable", lambda: kernel.prctl(4, 0))
        self.attempt("no_new_privileges", lambda: kernel.prctl(38, 1))
        self.attempt("syscall_filter", lambda: syscall_filter(kernel))

    def inspect(self):
        """Job only: completes the layers with what can be seen from where a program will stand."""
        self.layers["process_group"] = os.getpgid(0) == os.getpid()
        self.layers["empty_environment"] = not os.environ
        self.layers["temporary_cwd"] = os.getcwd() == self.directory and os.listdir() == []
        self.layers["unprivileged_uid"] = self.uid is not None and os.getresuid() == (self.uid,) * 3
        self.layers["whole_stdlib"] = os.access(os.__file__, os.R_OK)
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect(("127.0.0.1", 9))  # no packet is sent: this only asks for a route
            self.layers["no_network"] = False
        except OSError:
            self.layers["no_network"] = True
        return self.layers

    def kill_strays(self, group):
        """Kills what a job left running, in the widest way that can hit nothing else."""
        if os.getpid() == 1 and self.layers["private_processes"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        elif self.uid is not None:
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(OSError):
                    become(self.uid)
                    os.kill(-1, signal.SIGKILL)  # reached only under the uid that nothing else uses
                os._exit(0)
            os.waitpid(pid, os.WUNTRACED)  # or killers would pile up; a stray may have stopped or killed this one
        else:
            pids = [-group] if group else []
            with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
                pids += [int(word) for word in file.read().split()]
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def sweep(self, group=None):
        """Returns when no descendant is left; orphans fall to this process, so none is missed."""
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            self.kill_strays(group)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.001)
        raise SystemExit("evals/jail.py: a job could not be killed; the sandbox starts a new jail")
