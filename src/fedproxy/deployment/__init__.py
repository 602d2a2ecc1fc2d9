"""All that touches a socket, a key or Flower: the owner's and the data owners' sides of a federation."""
