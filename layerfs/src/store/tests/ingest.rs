//! The pipeline: order, equality with the plain way, holes, errors.

use std::cell::Cell;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

use super::*;
use crate::chunker::{Chunker, Cutter, Piece};
use crate::content::{Content, ContentBuilder, Extent, INLINE_MAX, read_at};
use crate::error::{Error, Result};
use crate::store::{FileSource, ReadSource, Session, Source, SourcePiece};

/// What the pipeline must be equal to.
fn plainly(session: &Session, chunker: Chunker, bytes: &[u8]) -> Content {
    if bytes.len() <= INLINE_MAX {
        return Content::Inline(bytes.to_vec());
    }
    let mut builder = ContentBuilder::new(chunker);
    let mut emit = |piece: Piece<'_>| {
        let extent = match piece {
            Piece::Hole(bytes) => Extent::Hole { bytes },
            Piece::Data(data) => Extent::Chunk { id: session.put(Class::Data, data)?, bytes: data.len() as u32 },
        };
        builder.push(extent, session)
    };
    let mut cutter = Cutter::new(chunker);
    cutter.data(bytes, &mut emit).unwrap();
    cutter.finish(&mut emit).unwrap();
    builder.finish(session).unwrap()
}

fn files() -> Vec<Vec<u8>> {
    let mut files: Vec<Vec<u8>> = (0..400).map(|n| noise(n % 300, (n as usize * 97) % 40_000)).collect();
    files.push(noise(1000, 9_000_000));
    files.push(vec![0; 3_000_000]);
    files.push([noise(1001, 300_000), vec![0; 700_000], noise(1001, 300_000)].concat());
    files.extend((0..200).map(|n| noise(n, (n as usize * 31) % 1500)));
    files
}

#[test]
fn contents_come_out_in_order_and_as_the_plain_way_makes_them() {
    let (_folder, store) = store();
    let session = store.session("pipeline");
    let files = files();
    let mut out = Vec::new();
    let mut ingest = session.ingest(|tag: Option<usize>, content| {
        out.push((tag, content));
        Ok(())
    });
    for (number, file) in files.iter().enumerate() {
        let chunker = if number % 2 == 0 { Chunker::Tree } else { Chunker::Aligned };
        ingest.file(Some(number), chunker, &mut ReadSource(&file[..])).unwrap();
        if number % 50 == 0 {
            ingest.pass(None).unwrap();
        }
    }
    ingest.finish().unwrap();
    session.commit().unwrap();
    assert_eq!(out.iter().filter(|(tag, _)| tag.is_none()).count(), files.len().div_ceil(50));
    let contents: Vec<_> = out.into_iter().filter_map(|(tag, content)| Some((tag?, content.unwrap()))).collect();
    let new = session.report().new_chunks;
    for (number, file) in files.iter().enumerate() {
        let chunker = if number % 2 == 0 { Chunker::Tree } else { Chunker::Aligned };
        assert_eq!(contents[number], (number, plainly(&session, chunker, file)));
        let mut back = vec![1; file.len() + 1];
        assert_eq!(read_at(&*store, &contents[number].1, 0, &mut back).unwrap(), file.len());
        assert!(back[..file.len()] == **file);
    }
    assert_eq!(session.report().new_chunks, new, "everything was there already");
}

#[test]
fn holes_of_files_are_skipped_and_do_not_change_the_content() {
    let (folder, store) = store();
    let session = store.session("sparse");
    let path = folder.path().join("sparse");
    let mut file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
    for at in [1u64 << 20, (64 << 20) + 4096 * 3] {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&noise(at, 10_000)).unwrap();
    }
    file.set_len(20 << 30).unwrap();
    let mut contents = Vec::new();
    let mut ingest = session.ingest(|(), content| {
        contents.push(content.unwrap());
        Ok(())
    });
    ingest.file((), Chunker::Aligned, &mut FileSource::new(&file, &path).unwrap()).unwrap();
    file.set_len(100).unwrap();
    ingest.file((), Chunker::Tree, &mut FileSource::new(&file, &path).unwrap()).unwrap();
    file.set_len(1000).unwrap();
    ingest.file((), Chunker::Tree, &mut FileSource::new(&file, &path).unwrap()).unwrap();
    ingest.finish().unwrap();
    assert_eq!(contents[0].len(), 20 << 30);
    assert!(contents[0].data_bytes() < 40_000, "{}", contents[0].data_bytes());
    assert_eq!(contents[1], Content::Inline(vec![0; 100]));
    assert_eq!((contents[2].len(), contents[2].data_bytes()), (1000, 0));
}

#[test]
fn heavy_tags_do_not_pile_up() {
    let (_folder, store) = store();
    let session = store.session("heavy");
    let done = Cell::new(0);
    let sink = |number: u64, _: Option<Content>| -> Result<()> {
        assert_eq!(number, done.replace(number + 1));
        Ok(())
    };
    let mut ingest = session.ingest(sink).weighing(|_| 1 << 20);
    for number in 0..50u64 {
        if number % 3 == 0 {
            ingest.pass(number).unwrap();
        } else {
            ingest.file(number, Chunker::Tree, &mut ReadSource(&noise(number, 5000)[..])).unwrap();
        }
        // Three wait, and one more may have begun.
        assert!(number + 1 - done.get() <= 4, "{number} taken, {} done", done.get());
    }
    ingest.finish().unwrap();
    assert_eq!(done.get(), 50);
}

struct Failing(usize);

impl Source for Failing {
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        if self.0 == 0 {
            return Err(Error::invalid("the source fails"));
        }
        self.0 -= 1;
        buffer.fill(self.0 as u8 + 1);
        Ok(SourcePiece::Data(buffer.len()))
    }
}

#[test]
fn errors_of_the_source_and_the_sink_end_it() {
    let (_folder, store) = store();
    for pieces in [0, 1, 50] {
        let session = store.session("fails");
        let mut ingest = session.ingest(|(), _| Ok(()));
        assert!(ingest.file((), Chunker::Tree, &mut Failing(pieces)).is_err());
    }
    let session = store.session("fails");
    let mut ingest = session.ingest(|(), _| Err(Error::Cancelled));
    ingest.file((), Chunker::Tree, &mut ReadSource(&noise(1, 5000)[..])).unwrap();
    assert!(matches!(ingest.finish(), Err(Error::Cancelled)));
}
