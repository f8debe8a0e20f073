//! Writes tar archives for the tests, right ones and wrong ones, header by header.

/// An archive under construction.
#[derive(Clone, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

/// The fields of a header that tests set.
#[derive(Clone)]
pub(crate) struct Header {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) link: Vec<u8>,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) owner: (u64, u64),
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
    pub(crate) gnu: bool,
}

impl Header {
    pub(crate) fn new(kind: u8, name: impl AsRef<[u8]>) -> Self {
        let name = name.as_ref().to_vec();
        Self {
            name,
            kind,
            link: Vec::new(),
            size: 0,
            mode: 0o644,
            owner: (0, 0),
            mtime: 0,
            device: (0, 0),
            gnu: false,
        }
    }

    pub(crate) fn encode(&self) -> [u8; 512] {
        let mut raw = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.name[..self.name.len().min(100)]);
        put(100, format!("{:07o}\0", self.mode).as_bytes());
        put(108, format!("{:07o}\0", self.owner.0).as_bytes());
        put(116, format!("{:07o}\0", self.owner.1).as_bytes());
        if self.size < 1 << 33 {
            put(124, format!("{:011o}\0", self.size).as_bytes());
        } else {
            put(124, &[0x80, 0, 0, 0]);
            put(128, &self.size.to_be_bytes());
        }
        put(136, format!("{:011o}\0", self.mtime).as_bytes());
        put(156, &[self.kind]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(257, if self.gnu { b"ustar  \0" } else { b"ustar\x0000" });
        put(329, format!("{:07o}\0", self.device.0).as_bytes());
        put(337, format!("{:07o}\0", self.device.1).as_bytes());
        set_checksum(&mut raw);
        raw
    }
}

/// Makes the checksum of a changed header right again.
pub(crate) fn set_checksum(raw: &mut [u8]) {
    raw[148..156].fill(b' ');
    let sum: u32 = raw[..512].iter().map(|byte| u32::from(*byte)).sum();
    raw[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

impl Tar {
    /// Appends a header as it is, and content padded to a block.
    pub(crate) fn raw(mut self, header: &Header, content: &[u8]) -> Self {
        self.0.extend(header.encode());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: impl AsRef<[u8]>, content: &[u8]) -> Self {
        self.raw(&Header { size: content.len() as u64, ..Header::new(b'0', name) }, content)
    }

    pub(crate) fn directory(self, name: impl AsRef<[u8]>) -> Self {
        self.raw(&Header { mode: 0o755, ..Header::new(b'5', name) }, b"")
    }

    pub(crate) fn link(self, kind: u8, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.raw(&Header { link: target.as_ref().to_vec(), ..Header::new(kind, name) }, b"")
    }

    /// A PAX header for the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let records: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.raw(&Header { size: records.len() as u64, ..Header::new(b'x', "pax") }, &records)
    }

    /// The whole archive.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// A PAX record with its own length in front.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (1..20)
        .map(|digits| rest + digits)
        .find(|length| rest + length.to_string().len() == *length)
        .unwrap();
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}
