"""The agent's doors: ``protocol`` is bytes in and out, ``http`` the sockets, ``routes`` joins them."""
