"""`xprompt serve`: a web page where a person drops an example pair and new images and watches them being drawn."""
