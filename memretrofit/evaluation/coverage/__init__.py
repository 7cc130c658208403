"""Which architectures of the installed Transformers a memory can enter, tried on tiny models.

`tiny` makes a random model of a type, `checks` and `seams` hold it to what a memory promises at
each of the three sites, `runner` does that for many types, each in a process of its own, and
`report` is the file, the table and what changed since the file was written.
"""
