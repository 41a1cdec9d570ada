"""Programs that should give solve(3) == 16 and solve(5) == 32, do not, and try to be graded right, to break out or to stay.

Beside those of test_sandbox.py, which try the layers one by one; these try the graders, by values and by test code. None
knows the right answers, which is the one thing that passes.
"""

FAKES = {
    "equal to everything": "class E:\n def __eq__(s, o): return True\n def __ne__(s, o): return False\ndef solve(n): return E()",
    "a string equal to everything": "class E(str):\n __eq__ = lambda s, o: True\n __hash__ = str.__hash__\ndef solve(n): return E('x')",
    "a list equal to everything": "class E(list):\n def __eq__(s, o): return True\ndef solve(n): return E()",
    "a dict of lies": "class E(dict):\n def items(s): return [('16', 16)]\n def __eq__(s, o): return True\ndef solve(n): return E(a=1)",
    "an int by its class": "class E:\n __class__ = int\n def __eq__(s, o): return True\n def __index__(s): return 16\ndef solve(n): return E()",
    "a metaclass of equals": (
        "class M(type):\n def __eq__(c, o): return True\n __hash__ = type.__hash__\n"
        "class E(metaclass=M): pass\ndef solve(n): return E"),
    "anything and itself": (
        "class E:\n def __getattr__(s, n): return s\n def __call__(s, *a): return s\n"
        " __eq__ = __bool__ = lambda *a: True\ndef solve(n): return E()"),
    "nan": "def solve(n): return float('nan')",
    "true": "def solve(n): return True",
    "not implemented": "def solve(n): return NotImplemented",
    "endless generator": "def solve(n):\n while True: yield 16",
    "a check of its own": "def check(candidate): pass\ndef solve(n): return 0\n_candidate = lambda n: 16",
    "no assertion errors": "import builtins\nclass A(BaseException): pass\nbuiltins.AssertionError = A\ndef solve(n): return 0",
    "assertion swallowed": "import sys\nsys.excepthook = lambda *a: None\ndef solve(n): raise AssertionError",
    "asked to stop early": "def solve(n): raise StopIteration",
    "exit with success": "def solve(n): raise SystemExit(0)",
    "exit before the tests": "import os\nprint('passed', flush=True)\nos._exit(0)",
    "exit at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef solve(n): return 0",
    "new stdout": "import sys, io\nsys.stdout = sys.stderr = io.StringIO('passed')\ndef solve(n): print('passed'); return 'passed'",
    "the verdict as a value": "def solve(n): return 'passed'",
    "patched eval": "import builtins\nbuiltins.eval = builtins.exec = builtins.compile = lambda *a, **k: 16\ndef solve(n): return 0",
    "patched import": "import builtins\nbuiltins.__import__ = lambda *a, **k: None\ndef solve(n): return 0",
    "patched encoder": "import __main__ as m\nm.encode = m._ascii = lambda v, wide=False: '16'\ndef solve(n): return 0",
    "patched attempt": "import __main__ as m\nm.attempt = lambda call, space: '16'\ndef solve(n): return 0",
    "patched server": "import __main__ as m\nm.Server.job = m.Server.run = m.answer = lambda *a, **k: None\ndef solve(n): return 0",
    "patched comparison": "import operator\noperator.eq = lambda a, b: True\nint.__eq__ if True else 0\ndef solve(n): return 0",
    "cursed int": (
        "import ctypes, gc\ndef solve(n):\n d = gc.get_referents(int.__dict__)[0]\n d['__eq__'] = lambda a, b: True\n"
        " ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))\n return 0"),
    "frames": (
        "import sys\ndef solve(n):\n f, found = sys._getframe(), []\n while f:\n"
        "  found += [repr(v)[:60] for v in f.f_locals.values() if 'assert' in repr(v)]\n"
        "  f = f.f_back\n return found or 'nothing'"),
    "garbage collector": (
        "import gc\ndef solve(n):\n"
        " found = [o for o in gc.get_objects() if isinstance(o, dict) and ('tests' in o or 'expected' in o or 'answers' in o)]\n"
        " return next((o['expected'][0] for o in found if 'expected' in o), 'nothing')"),
    "changed calls": (
        "import sys\ndef solve(n):\n f = sys._getframe()\n while f:\n"
        "  c = f.f_locals.get('calls')\n  if isinstance(c, list): c[:] = ['16'] * len(c)\n"
        "  f = f.f_back\n return 0"),
    "a tracer": "import sys\nsys.settrace(lambda f, e, a: None)\nsys.setprofile(lambda f, e, a: f.f_locals.update(n=16))\ndef solve(n): return n",
    "an audit hook": "import sys\ndef hook(*a): raise RuntimeError\nsys.addaudithook(hook)\ndef solve(n): return 0",
    "frame of an examiner": (
        "import sys, os\ndef solve(n):\n f = sys._getframe()\n while 'nonce' not in f.f_locals: f = f.f_back\n x = f.f_locals['nonce']\n"
        " os.write(3, f\"{x} V\\n'passed'\\n''\\n'solve(3)'\\n'solve(5)'\\n{x} end\\n\".encode())\n os._exit(0)"),
    "reply of a jail": (
        "import os\ndef solve(n):\n for d in range(99):\n"
        "  try: os.write(d, b'{\"data\": \"passed\", \"end\": \"reported\", \"canary\": false}\\n')\n"
        "  except OSError: pass\n return 0"),
    "code as a value": "class R(str): pass\ndef solve(n): return \"__import__('os')._exit(0)\"",
    "look-alike name": "def s\u043elve(n): return 16",
    "right to left": "def solve(n): return 0 #\u202e 61 nruter :)n(evlos fed",
}
ESCAPES = {
    "read its memory": "def solve(n): return open('/proc/self/mem', 'rb').read(16)",
    "read the tests": "import glob\ndef solve(n): return [open(f).read() for f in glob.glob('/**/*exam*.py', recursive=True)][0]",
    "read the password file": "def solve(n): return open('/etc/passwd').read()",
    "link outside": "import os\ndef solve(n): os.link('/etc/hosts', 'here'); return 'linked'",
    "write a temporary file": "def solve(n): open('/tmp/hostile-was-here', 'w').write('x'); return 'written'",
    "shared memory": "def solve(n): open('/dev/shm/hostile-was-here', 'w').write('x'); return 'written'",
    "a local socket": "import socket\ndef solve(n): socket.socketpair(); return 'open'",
    "a name server": "import socket\ndef solve(n): return socket.getaddrinfo('example.org', 80)",
    "trace its parent": "import ctypes, os\ndef solve(n): return 16 if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0 else 'refused'",
    "read its parent": (
        "import ctypes, os\ndef solve(n):\n b = ctypes.create_string_buffer(64)\n v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 64)\n"
        " return 'read' if ctypes.CDLL(None).process_vm_readv(os.getppid(), v, 1, v, 1, 0) > 0 else 'refused'"),
    "run from memory": "import os\ndef solve(n): f = os.memfd_create('x'); os.execve(f, ['x'], {}); return 'run'",
    "stop itself": "import signal\ndef solve(n): signal.raise_signal(signal.SIGSTOP); return 0",
    "kill itself": "import os\ndef solve(n): os.abort()",
    "more rights": "import resource\ndef solve(n): resource.setrlimit(resource.RLIMIT_CPU, (-1, -1)); return 0",
}
STAYS = {
    "late thread": (
        "import threading, time, os\ndef late():\n time.sleep(.1)\n os.write(3, b'passed')\n"
        "def solve(n): threading.Thread(target=late).start(); return 0"),
    "late child": "import os, time\ndef solve(n):\n if os.fork() == 0:\n  time.sleep(.1); os.write(3, b'passed'); time.sleep(60)\n return 0",
    "two reports": "import os\ndef solve(n): return os.fork() and 0",
    "daemon": "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  time.sleep(60)\n os._exit(0)\ndef solve(n): return 0",
    "deaf loop": (
        "import signal\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n"
        " except (OSError, ValueError): pass\ndef solve(n):\n while True: pass"),
    "alarm": (
        "import signal\nsignal.signal(signal.SIGALRM, lambda *a: 1 / 0)\n"
        "signal.setitimer(signal.ITIMER_REAL, .001, .001)\ndef solve(n):\n while True: pass"),
    "large power": "def solve(n): return len(str(7 ** 7 ** 9))",
    "backtracking": "import re\ndef solve(n): return re.match('(a|a)*b', 'a' * 64)",
    "unpacked bomb": "import zlib\nb = zlib.compress(bytes(1 << 26))\ndef solve(n): return len(zlib.decompress(b) * 64)",
    "flood of output": "import sys\ndef solve(n):\n for _ in range(10 ** 5): sys.stdout.write('passed\\n' * 9)\n return 0",
    "deep source": "def solve(n): return " + "(" * 5000 + "16" + ")" * 5000,
    "a hash that hangs": "class H:\n def __hash__(s):\n  while True: pass\ndef solve(n): return {H(): 1}",
    "a repr that exits": "class R:\n def __repr__(s): raise SystemExit(0)\n __str__ = __del__ = __repr__\ndef solve(n): return R()",
}
CORPUS = FAKES | ESCAPES | STAYS
