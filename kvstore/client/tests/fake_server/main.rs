//! The SDK against a server in this process that can be told to lie, to stall and to forget.

mod calls;
mod support;
mod transfers;
