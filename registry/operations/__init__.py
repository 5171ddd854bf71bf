"""What the facade does, one module a verb. Policy lives here: what is stored, in what order, and what
is refused. Rooms below know rows and bytes; none of them knows a push."""
