"""Object stores: one way to list, read, write and delete what is in them."""
