"""Everything that listens on a socket."""
