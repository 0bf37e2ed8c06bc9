"""What goes over the socket: frames (`channel`), who is there (`handshake`), and the declared messages (`messages`)."""
