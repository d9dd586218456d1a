"""Messages and stubs generated from proto/ by `python -m runtime.rpc.generate`; nothing here is edited."""
