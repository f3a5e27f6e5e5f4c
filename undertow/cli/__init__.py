"""The command line. `main` imports one module a command, and only when that command is typed."""
