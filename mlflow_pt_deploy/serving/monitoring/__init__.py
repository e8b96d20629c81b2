"""What a server notices about its own answers, over all workers."""
