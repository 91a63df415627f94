"""Intel TDX: quotes v4 and v5. *format* reads bytes, *verify* decides whether they are authentic, *roots* are data."""
