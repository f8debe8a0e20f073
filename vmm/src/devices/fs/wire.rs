//! What the VMM reads and writes of FUSE's messages, as Linux's `include/uapi/linux/fuse.h` has them. The rest is for the guest's kernel
//! and the server to understand.

/// Bytes of `fuse_in_header`.
pub(super) const IN_HEADER: usize = 40;
/// Bytes of `fuse_out_header`.
pub(super) const OUT_HEADER: usize = 16;
/// Bytes of `fuse_read_in` and of `fuse_write_in`, which begin alike.
pub(super) const DATA_IN: usize = 40;
/// Bytes of `fuse_flush_in`, which begins with the file's handle.
pub(super) const FLUSH_IN: usize = 24;
/// Bytes of `fuse_open_out`, which begins with the file's handle.
const OPEN_OUT: usize = 16;
/// Bytes of `fuse_entry_out`, which comes before it when the file is new.
const ENTRY_OUT: usize = 128;
/// Where `unique` is in both headers.
const UNIQUE: std::ops::Range<usize> = 8..16;

/// Errors are Linux's, the wrong way round, and the kernel takes none beyond this.
const ERRNO_MAX: i32 = 511;

/// The requests that mean something to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// FORGET and BATCH_FORGET, which are not answered.
    Forget,
    /// READ
    Read,
    /// WRITE
    Write,
    /// OPEN, CREATE and TMPFILE: the answer comes with a file, and its handle is that far into the answer.
    Open { handle_at: usize },
    /// RELEASE
    Release,
    /// FLUSH
    Flush,
    /// INTERRUPT, which may be ignored.
    Interrupt,
    /// DESTROY
    Destroy,
    /// What only the server understands.
    Other,
}

impl Operation {
    /// What an opcode means.
    fn of(opcode: u32) -> Self {
        match opcode {
            2 | 42 => Self::Forget,
            14 => Self::Open { handle_at: OUT_HEADER },
            15 => Self::Read,
            16 => Self::Write,
            18 => Self::Release,
            25 => Self::Flush,
            35 | 51 => Self::Open { handle_at: OUT_HEADER + ENTRY_OUT },
            36 => Self::Interrupt,
            38 => Self::Destroy,
            _ => Self::Other,
        }
    }

    /// Bytes of room that a request must have for its answer. A file must not be opened for a guest that could not be told its handle.
    pub(super) fn answer_min(self) -> usize {
        match self {
            Self::Open { handle_at } => handle_at + OPEN_OUT,
            _ => OUT_HEADER,
        }
    }
}

const DESTROY: u32 = 38;

/// What a request's header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct InHeader {
    /// Bytes of the whole request.
    pub(super) len: usize,
    pub(super) operation: Operation,
    pub(super) unique: u64,
}

impl InHeader {
    /// Reads it from the beginning of a request.
    pub(super) fn parse(bytes: &[u8; IN_HEADER]) -> Self {
        Self {
            len: word(bytes, 0) as usize,
            operation: Operation::of(word(bytes, 4)),
            unique: long(bytes, UNIQUE.start),
        }
    }
}

/// What READ and WRITE say behind their header.
#[derive(Clone, Copy, Debug)]
pub(super) struct DataIn {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) size: usize,
    /// A WRITE by a program whose descriptor appends now. Pages that are written back are not: they have their places, by whatever
    /// descriptor that is done.
    pub(super) appends: bool,
}

/// `FUSE_WRITE_CACHE`: pages are written back.
const WRITE_CACHE: u32 = 1;

impl DataIn {
    /// Reads it from behind a header.
    pub(super) fn parse(bytes: &[u8; DATA_IN]) -> Self {
        let (write_flags, flags) = (word(bytes, 20), word(bytes, 32).cast_signed());
        Self {
            handle: long(bytes, 0),
            offset: long(bytes, 8),
            size: word(bytes, 16) as usize,
            appends: flags & libc::O_APPEND != 0 && write_flags & WRITE_CACHE == 0,
        }
    }
}

/// What an answer's header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct OutHeader {
    pub(super) unique: u64,
    len: usize,
    error: i32,
}

impl OutHeader {
    /// Reads it from the beginning of an answer, if there is one.
    pub(super) fn parse(answer: &[u8]) -> Option<Self> {
        let bytes = answer.first_chunk::<OUT_HEADER>()?;
        Some(Self {
            len: word(bytes, 0) as usize,
            error: word(bytes, 4).cast_signed(),
            unique: long(bytes, UNIQUE.start),
        })
    }

    /// True when it is the header of an answer of so many bytes that the guest's kernel accepts.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        self.len == bytes
            && (-ERRNO_MAX..=0).contains(&self.error)
            && (self.error == 0 || bytes == OUT_HEADER)
    }

    /// True when what was asked was done.
    pub(super) fn is_success(&self) -> bool {
        self.error == 0
    }
}

/// An answer of the VMM's own: a header, and what WRITE is answered.
pub(super) fn answer(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(OUT_HEADER + body.len()).expect("a header and a few bytes");
    let mut bytes = Vec::with_capacity(OUT_HEADER + body.len());
    bytes.extend(len.to_le_bytes());
    bytes.extend((-error).to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// Gives a message another `unique`. It must be longer than a header.
pub(super) fn set_unique(message: &mut [u8], unique: u64) {
    message[UNIQUE].copy_from_slice(&unique.to_le_bytes());
}

/// A DESTROY, for the server to forget all that it knows of the guest.
pub(super) fn destroy(unique: u64) -> [u8; IN_HEADER] {
    let mut bytes = [0; IN_HEADER];
    bytes[..4].copy_from_slice(&u32::try_from(IN_HEADER).expect("40").to_le_bytes());
    bytes[4..8].copy_from_slice(&DESTROY.to_le_bytes());
    set_unique(&mut bytes, unique);
    bytes
}

/// The 32-bit number there, which must be inside the message.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// The 64-bit number there, which must be inside the message.
pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
