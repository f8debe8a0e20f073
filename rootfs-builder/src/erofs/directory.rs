//! Directories on disk: blocks of sorted entries, each block with its own names behind them.

use super::format::{BLOCK, BLOCK_BYTES, DIRENT_BYTES, dirent};
use super::tree::{Entries, FileType, NodeId};

/// The size in bytes (`i_size`) of a directory with these entries and the two that every directory has.
pub(super) fn size(entries: &Entries) -> u64 {
    let mut size = Size::default();
    for (name, ()) in with_dots(entries.keys().map(|name| (&**name, ())), (), ()) {
        size.add(name.len());
    }
    size.full_blocks * BLOCK + size.used as u64
}

/// The content of a directory: full blocks, the last one cut to what is used. `describe` gives the node number and type of
/// a child.
pub(super) fn encode(
    entries: &Entries,
    (own, parent): (NodeId, NodeId),
    describe: impl Fn(NodeId) -> (u64, FileType),
) -> Vec<u8> {
    let mut content = Vec::new();
    let mut block: Vec<(&[u8], NodeId)> = Vec::new();
    let mut size = Size::default();
    for (name, id) in with_dots(entries.iter().map(|(name, id)| (&**name, *id)), own, parent) {
        if size.add(name.len()) {
            encode_block(&mut content, &block, &describe);
            content.resize(content.len().next_multiple_of(BLOCK_BYTES), 0);
            block.clear();
        }
        block.push((name, id));
    }
    encode_block(&mut content, &block, &describe);
    content
}

fn encode_block(
    content: &mut Vec<u8>,
    block: &[(&[u8], NodeId)],
    describe: &impl Fn(NodeId) -> (u64, FileType),
) {
    let mut offset = block.len() * DIRENT_BYTES;
    for &(name, id) in block {
        let (node, kind) = describe(id);
        content.extend_from_slice(&dirent(node, u16::try_from(offset).expect("within a block"), kind));
        offset += name.len();
    }
    content.extend(block.iter().flat_map(|(name, _)| *name));
}

/// Fills blocks in order.
#[derive(Default)]
struct Size {
    full_blocks: u64,
    used: usize,
}

impl Size {
    /// Makes room for a name; true if that began another block.
    fn add(&mut self, name_length: usize) -> bool {
        let entry = DIRENT_BYTES + name_length;
        let next = self.used + entry > BLOCK_BYTES;
        if next {
            self.full_blocks += 1;
            self.used = 0;
        }
        self.used += entry;
        next
    }
}

/// The sorted names with `.` and `..` where byte order puts them, which lookups rely on: `!` and `-` come first.
fn with_dots<'a, T>(
    entries: impl Iterator<Item = (&'a [u8], T)>,
    own: T,
    parent: T,
) -> impl Iterator<Item = (&'a [u8], T)> {
    let mut dots = [(&b"."[..], own), (&b".."[..], parent)].into_iter().peekable();
    let mut entries = entries.peekable();
    std::iter::from_fn(move || match (dots.peek(), entries.peek()) {
        (Some((dot, _)), Some((name, _))) if name < dot => entries.next(),
        (Some(_), _) => dots.next(),
        (None, _) => entries.next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(names: impl IntoIterator<Item = String>) -> Entries {
        (2..).map(NodeId).zip(names).map(|(id, name)| (name.into_bytes().into(), id)).collect()
    }

    #[test]
    fn dots_are_sorted_among_names() {
        let entries = entries(["-".into(), "..a".into(), "...".into(), "x".into()]);
        let content = encode(&entries, (NodeId(0), NodeId(1)), |id| (u64::from(id.0), FileType::File));
        let count = 6;
        assert_eq!(content[8..10], u16::to_le_bytes(count * 12));
        assert_eq!(&content[72..], b"-........ax");
        assert_eq!(content.len() as u64, size(&entries));
    }

    #[test]
    fn size_agrees_with_the_encoding_across_blocks() {
        for count in [0, 1, 14, 15, 16, 300, 1000] {
            let entries = entries((0..count).map(|i| format!("{i:0>255}")));
            let content = encode(&entries, (NodeId(0), NodeId(0)), |_| (1, FileType::Directory));
            assert_eq!(content.len() as u64, size(&entries), "{count} entries");
        }
    }
}
