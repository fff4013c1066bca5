"""How quality and speed are measured; nobody needs it to use anything."""
