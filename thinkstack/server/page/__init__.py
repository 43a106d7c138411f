"""The chat page's server: sessions, conversations, answers that outlive their readers, and rendering."""
