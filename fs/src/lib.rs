//! A file server for one guest. It shows directories and files of the host, its shares, in one synthetic root directory and
//! speaks FUSE with the VMM's fs device about them. Names, attributes and policy are its business; when the guest opens a
//! regular file, the VMM is handed that one descriptor and moves the data itself.
//!
//! - [`control`]: what the owner says, all that an owner needs

pub mod control;
