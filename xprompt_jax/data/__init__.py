"""Images, tasks and the token store: from files to training rows."""
