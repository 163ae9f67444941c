"""What turns a graph into an engine, one runtime a file."""
