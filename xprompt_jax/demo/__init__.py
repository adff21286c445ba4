"""`xprompt demo`: the model inside the package follows examples (`shipped`), or a smaller one is trained from nothing (`training`)."""
