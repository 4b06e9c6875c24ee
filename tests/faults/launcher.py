"""Stands for ``python -m app.worker`` where a server was forked: asks the zygote for a worker and ends as it ends.

    launcher.py SOCKET --endpoint ENDPOINT

The worker gets this process's standard input and error. It imports nothing of the project, so that it starts at once.
"""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as zygote:
    zygote.connect(sys.argv[1])
    socket.send_fds(zygote, [json.dumps({"work": sys.argv[3], "for": os.getppid()}).encode()], [0, 2])
    # from here on the worker alone holds the pipe that the server gave us
    sys.stdin.close()
    code = zygote.makefile().readline().strip()
sys.exit(int(code) % 256 if code else 1)
