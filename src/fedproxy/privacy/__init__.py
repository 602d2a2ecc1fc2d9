"""What a federation gives away: how it is measured, and attacks that measure it."""
