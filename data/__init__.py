"""Preparing data: prepare.py is the command, the other modules are its parts."""
