"""The reviewers' page: what there is to read, what is shown of it, and the server on this machine."""
