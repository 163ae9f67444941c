"""The agent's doors: ``protocol`` is bytes in and bytes out, ``http`` the sockets, ``routes`` joins them."""
