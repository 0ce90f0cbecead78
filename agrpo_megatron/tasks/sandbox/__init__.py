"""Calls in worker processes, bounded in time and memory for any input.

    Sandbox --socket--> server (a fresh interpreter: imports once) --fork--> a few workers

A worker makes many calls. It is replaced by a new fork of the server, which has made no call, if a
call hangs, dies, runs out of memory, or leaves behind threads, processes, files or memory, and
after `worker.MOST_CALLS` in any case. A worker over its time limit is killed with all its
processes, even inside C code; the server and other calls are not affected. Workers die with the
server, the server with its parent.
"""
