"""Doing it: the llama.cpp programs, the processes, the server."""
