"""The passes that cannot share the first forward: other weights, other inputs, or samples one by one."""
