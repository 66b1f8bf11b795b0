"""Teachers behind HTTP: a stock server as a teacher, our own server as one, and that server."""
