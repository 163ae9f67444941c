"""What the zoo is made of: its models, and the process that takes one of them from end to end."""
