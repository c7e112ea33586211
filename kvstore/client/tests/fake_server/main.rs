//! The SDK against a server in this process that can be told to lie, to stall and to forget.

mod calls;
mod fake_sessions;
mod session_files;
mod sessions;
mod support;
mod transfers;
