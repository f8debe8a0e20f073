//! Decompression of layers, in safe Rust: the input is hostile.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const BUFFER_BYTES: usize = 128 << 10;

/// Reads a layer, compressed or not. What its first bytes say counts, as everywhere: media types of real images are not
/// reliable, and `docker save` tells none.
pub(crate) fn decompress<'a>(source: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut source = BufReader::with_capacity(BUFFER_BYTES, source);
    let start = source.fill_buf()?;
    if start.starts_with(&GZIP) {
        Ok(Box::new(MultiGzDecoder::new(source)))
    } else if is_zstd(start) {
        Ok(Box::new(Zstd { source, decoder: FrameDecoder::new() }))
    } else {
        Ok(Box::new(source))
    }
}

/// Whether a file begins like a compressed one.
pub(super) fn is_compressed(file: &File) -> io::Result<bool> {
    let mut start = [0; 4];
    let count = file.read_at(&mut start, 0)?;
    Ok(start[..count].starts_with(&GZIP) || is_zstd(&start[..count]))
}

/// A frame, or a skippable one, which parallel compressors begin with (RFC 8878, 3.1.2).
fn is_zstd(start: &[u8]) -> bool {
    start.starts_with(&ZSTD) || matches!(start, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// A Zstandard stream of any number of frames, skippable ones among them. The decoder bounds the window at 128 MiB.
struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
}

impl<R: BufRead> Zstd<R> {
    /// Goes to the next frame with data; false at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut self.source.by_ref().take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.decoder.can_collect() == 0 && !buffer.is_empty() {
            if self.decoder.is_finished() {
                if !self.next_frame()? {
                    return Ok(0);
                }
            } else {
                let decoded =
                    self.decoder.decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1));
                decoded.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            }
        }
        self.decoder.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn read(stream: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decompress(stream)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        compress_to_vec(data, CompressionLevel::Fastest)
    }

    #[test]
    fn streams_of_several_members_are_read_to_the_end() {
        let data: Vec<u8> = (0..300_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let expected = [&data[..], b"tail"].concat();
        assert_eq!(read(&[gzip(&data), gzip(b"tail")].concat()).unwrap(), expected);
        let skippable = [&0x184d_2a50u32.to_le_bytes()[..], &3u32.to_le_bytes(), b"xyz"].concat();
        let frames = [zstd(&data), skippable.clone(), zstd(b"tail"), skippable.clone()].concat();
        assert_eq!(read(&frames).unwrap(), expected);
        assert_eq!(read(&[skippable, zstd(b"first")].concat()).unwrap(), b"first");
        assert_eq!(read(b"plain").unwrap(), b"plain");
        assert_eq!(read(b"").unwrap(), b"");
    }

    #[test]
    fn damaged_streams_are_errors() {
        for whole in [gzip(&[7; 5000]), zstd(&[7; 5000])] {
            assert!(read(&whole[..whole.len() - 9]).is_err());
            assert!(read(&[&whole[..], b"garbage"].concat()).is_err());
        }
        assert!(
            read(&[&zstd(b"a")[..], &0x184d_2a50u32.to_le_bytes(), &9u32.to_le_bytes()].concat()).is_err()
        );
    }
}
