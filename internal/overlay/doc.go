// Package overlay makes an image that can only be read a volume that can be
// written. What clients write goes to one local file, what they have not written
// is read from the image (the base), which may be far away and slow. Hydrate
// brings the rest of the base into the file; from then on no base is needed, and
// the file is the raw volume, byte for byte.
//
// # The two files
//
// FILE is sparse and has the size of the volume; block n of 4 KiB is at n × 4096.
// FILE.drc-overlay, the sidecar, says which base FILE belongs to and which of its
// blocks count: docs/FORMAT-OVERLAY.md has its bytes. There are two bits for each
// block:
//
//   - written: the block's content is in FILE, as this boot of the machine knows it;
//   - durable: it was synced there, once. A durable block is written too.
//
// A bit is never taken back while a boot lasts. A block without the bit that
// counts reads as the base has it, whatever FILE has there.
//
// # Order
//
// A write: the pages of the sidecar that it needs are there (W0); space for what
// it overwrites is reserved (W1); its data is written to FILE, with what the base
// has in the rest of the first and last block (W2); the written bits are set (W3);
// it returns. Zero punches a hole at W2. All of it happens under a lock of the
// range of blocks; what the base has was fetched before that, since it never
// changes, and counts only for blocks that are still not written then.
//
// A flush: the written bits set so far are noted (F1); FILE is synced (F2); the
// durable bits are set for those noted (F3); the sidecar is synced (F4); it
// returns. If all blocks are durable now, the state says complete (F5), and the
// sidecar is synced again (F6).
//
// At open: after a death of the process, in the same boot of the machine, FILE is
// synced and all that is written becomes durable. In another boot the state gets
// a new, random activation: in pages of earlier ones only the durable bits count.
//
// # Crashes
//
// Killed before W3 has set a block's bit: the block is as it was before. That was
// a write that had not returned. Killed after W3: it is written, since the kernel
// keeps what it was given.
//
// Power lost: only durable bits count, and each was set after F2 had synced the
// block's content. A block written and not flushed is the base's again, or, if it
// was durable before, in each sector the old or the new content, as on any disk.
// FILE may hold anything in blocks that are not durable; it is never read: who
// writes a part of such a block writes all of it, and Zero always punches. A
// page of the sidecar is one sector, which a disk writes whole or not at all, so
// no power cut leaves a damaged one.
//
// A sync that fails is never tried again: the kernel tells of lost data once. The
// device takes no writes from then on, and the state gets an activation that no
// page is of, so that what opens it next trusts the durable bits only.
//
// A full disk: W0 and W1 fail before anything that can be read was changed, and
// W2 fails with space lacking for blocks only that are not written.
//
// # What it never does
//
// It never writes to a file that it has not made, never reads the base for a
// block that is written or written whole, and never takes damage in the sidecar
// for bits: that is an error. It cannot find rot in FILE, as no raw volume can. It
// trusts that a boot of the machine keeps what it was given: a disk that is torn
// out and put back in the same boot, while a volume on it is served, may have lost
// written blocks that were never flushed.
//
// # Memory
//
// At most 8192 pages of the sidecar (8 MiB) and the bits of as many that were not
// flushed (3 MiB), 36 KiB for each TiB of the volume, the requests in flight, and
// 1 MiB for each worker of Hydrate. The sidecar takes up to 72 MiB of disk for each
// TiB, where blocks are written; it is sparse elsewhere.
package overlay
