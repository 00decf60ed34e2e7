"""The HTTP routes by what they are for. They only translate: bodies to arguments, answers to words."""
