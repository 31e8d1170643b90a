//! migrator.
