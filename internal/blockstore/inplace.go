package blockstore

import (
	"errors"
	"fmt"
	"io"
	"syscall"
)

// ErrChecksum says that a block is not what was written there.
var ErrChecksum = errors.New("block does not match its checksum")

// BlockError says which blocks of a disk could not be read here, or hold
// something else than was written. The peer's copy may answer, see Store.Repair.
type BlockError struct {
	Disk string
	Off  int64 // bytes, a multiple of BlockSize
	Len  int64 // bytes, a multiple of BlockSize; what lies behind was not tried
	Err  error // ErrChecksum, or what the kernel said
}

func (e *BlockError) Error() string {
	return fmt.Sprintf("read %d bytes at %d of %s: %v", e.Len, e.Off, e.Disk, e.Err)
}

// Unwrap returns the cause.
func (e *BlockError) Unwrap() error { return e.Err }

// readImage reads from the image as it is.
func (s *Store) readImage(p []byte, off int64) error {
	if _, err := s.raw.ReadAt(p, off); err != nil {
		if errors.Is(err, io.EOF) {
			err = ErrCorrupt // the image was cut under our feet
		}
		return fmt.Errorf("read %s: %w", s.id, err)
	}
	return nil
}

// readBlocks reads whole blocks and verifies them. A difference may come from a
// write under way; only without one it counts.
func (s *Store) readBlocks(p []byte, off int64) error {
	err := s.readImage(p, off)
	if !s.sums.on() {
		if err == nil || !mediumError(err) {
			return err
		}
	} else if err == nil {
		if bad, err := s.verify(p, off); err != nil || bad < 0 {
			return err
		}
	}
	l := s.blocks.lock(off, off+int64(len(p)))
	defer s.blocks.unlock(l)
	return s.readLocked(p, off)
}

// readLocked is readBlocks where no write can be under way, and says which block is bad.
func (s *Store) readLocked(p []byte, off int64) error {
	err := s.readImage(p, off)
	if err != nil && !mediumError(err) {
		return err
	}
	for at := int64(0); err != nil && at < int64(len(p)); at += BlockSize {
		if e := s.readImage(p[at:at+BlockSize], off+at); e != nil {
			s.badBlocks.Add(1)
			return &BlockError{Disk: s.id, Off: off + at, Len: BlockSize, Err: e}
		}
	}
	if !s.sums.on() {
		return nil
	}
	bad, err := s.verify(p, off)
	if err != nil || bad < 0 {
		return err
	}
	s.badBlocks.Add(1)
	return &BlockError{Disk: s.id, Off: bad, Len: BlockSize, Err: ErrChecksum}
}

// mediumError tells what may concern some blocks only.
func mediumError(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EBADMSG) || errors.Is(err, syscall.EUCLEAN) ||
		errors.Is(err, syscall.EREMOTEIO) || errors.Is(err, syscall.ENODATA)
}

// readParts is readBlocks for any range.
func (s *Store) readParts(p []byte, off int64) error {
	for len(p) > 0 {
		in := off % BlockSize
		if in == 0 && len(p) >= BlockSize {
			n := len(p) / BlockSize * BlockSize
			if err := s.readBlocks(p[:n], off); err != nil {
				return err
			}
			p, off = p[n:], off+int64(n)
			continue
		}
		n := min(BlockSize-in, int64(len(p)))
		if err := s.readPart(p[:n], off-in, in); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (s *Store) readPart(p []byte, off, in int64) error {
	if !s.sums.on() {
		return s.readImage(p, off+in)
	}
	b := s.buffers.get()
	defer s.buffers.put(b)
	if err := s.readBlocks(b[:], off); err != nil {
		return err
	}
	copy(p, b[in:])
	return nil
}

// lockBlocks locks the blocks that a range touches.
func (s *Store) lockBlocks(off, n int64) *rangeEntry {
	return s.blocks.lock(off/BlockSize*BlockSize, (off+n+BlockSize-1)/BlockSize*BlockSize)
}

// writeRange changes a range of the image whose blocks are locked.
func (s *Store) writeRange(p []byte, off int64) error {
	s.touch(off, int64(len(p)))
	for len(p) > 0 {
		n := min(int64(len(p)), ExtentSize-off%ExtentSize)
		if err := s.writePiece(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// writePiece is writeRange within one extent.
func (s *Store) writePiece(p []byte, off int64) error {
	e, doubt, err := s.act.begin(off, int64(len(p)))
	if err != nil {
		return err
	}
	s.point("image.write")
	if e.page == nil {
		_, err = s.raw.WriteAt(p, off)
	} else {
		err = s.writeSummed(e, doubt, p, off)
	}
	s.act.end(e)
	if err != nil {
		return fmt.Errorf("write %s: %w", s.id, err)
	}
	s.point("image.written")
	return nil
}

// writeSummed writes and keeps the checksums. Of a block that is written in part
// the rest must be right before: a checksum made over damage would hide it.
func (s *Store) writeSummed(e *extent, doubt *doubts, p []byte, off int64) error {
	n := off % ExtentSize / BlockSize
	in, end := off%BlockSize, (off+int64(len(p)))%BlockSize
	var head, tail uint32
	var err error
	if first := min(BlockSize-in, int64(len(p))); in != 0 || first < BlockSize {
		if head, err = s.mergedSum(p[:first], off-in, in); err != nil {
			return err
		}
	}
	if end != 0 && in+int64(len(p)) > BlockSize {
		if tail, err = s.mergedSum(p[int64(len(p))-end:], off+int64(len(p))-end, 0); err != nil {
			return err
		}
	}
	if _, err := s.raw.WriteAt(p, off); err != nil {
		s.act.suspect(e, off, int64(len(p)))
		return err
	}
	if in != 0 || int64(len(p)) < BlockSize {
		e.know(n, head, doubt)
		n, p = n+1, p[min(BlockSize-in, int64(len(p))):]
	}
	for ; len(p) >= BlockSize; n, p = n+1, p[BlockSize:] {
		e.know(n, sumOf(p[:BlockSize]), doubt)
	}
	if len(p) > 0 {
		e.know(n, tail, doubt)
	}
	return nil
}

// mergedSum is the checksum of a block as it will be when p is written at in.
func (s *Store) mergedSum(p []byte, block, in int64) (uint32, error) {
	b := s.buffers.get()
	defer s.buffers.put(b)
	if err := s.readLocked(b[:], block); err != nil {
		return 0, err
	}
	copy(b[in:], p)
	return sumOf(b[:]), nil
}

// zeroRange makes a range of the image read as zeroes; its blocks are locked.
func (s *Store) zeroRange(off, n int64, punch bool) error {
	s.touch(off, n)
	for first := true; n > 0; first = false {
		k := min(n, ExtentSize-off%ExtentSize)
		if no := off / ExtentSize; first || no%s.act.span() == 0 {
			if err := s.act.warm(no, (off+n-1)/ExtentSize); err != nil {
				return err
			}
		}
		if err := s.zeroPiece(off, k, punch); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// zeroPiece is zeroRange within one extent.
func (s *Store) zeroPiece(off, n int64, punch bool) error {
	if in := off % BlockSize; s.sums.on() && (in != 0 || n < BlockSize) {
		k := min(BlockSize-in, n)
		if err := s.writePiece(zeroBlock[:k], off); err != nil || k == n {
			return err
		}
		off, n = off+k, n-k
	}
	if in := (off + n) % BlockSize; s.sums.on() && in != 0 {
		if err := s.writePiece(zeroBlock[:in], off+n-in); err != nil || in == n {
			return err
		}
		n -= in
	}
	e, doubt, err := s.act.begin(off, n)
	if err != nil {
		return err
	}
	defer s.act.end(e)
	s.point("image.write")
	if err := s.raw.Zero(off, n, punch); err != nil {
		s.act.suspect(e, off, n)
		return fmt.Errorf("zero %s: %w", s.id, err)
	}
	if e.page == nil {
		return nil
	}
	for b := off % ExtentSize / BlockSize; b < (off%ExtentSize+n)/BlockSize; b++ {
		e.know(b, 0, doubt)
	}
	s.point("image.written")
	return nil
}

// Repair replaces damaged blocks by what fetch puts into the buffer, usually the
// peer's copy: off and n are those of a BlockError. No write is under way in the
// blocks meanwhile, so fetch must not wait for one. A block that is right by now
// is left alone. An error of fetch is returned as it is; a block that was fetched
// and cannot be written is a BlockError. Durable as any write.
func (s *Store) Repair(off, n int64, fetch func(p []byte, off int64) error) error {
	if err := s.checkWrite(off, n); err != nil {
		return err
	}
	if off%BlockSize != 0 || n%BlockSize != 0 {
		return fmt.Errorf("repair %d bytes at %d of %s: not whole blocks: %w", n, off, s.id, syscall.EINVAL)
	}
	l := s.lockBlocks(off, n)
	defer s.blocks.unlock(l)
	b := s.buffers.get()
	defer s.buffers.put(b)
	for end := off + n; off < end; off += BlockSize {
		var bad *BlockError
		if err := s.readLocked(b[:], off); err == nil {
			continue
		} else if !errors.As(err, &bad) {
			return err
		}
		if err := fetch(b[:], off); err != nil {
			return err
		}
		s.point("repair.write")
		err := s.writeRange(b[:], off)
		s.written.Add(1)
		if err != nil {
			return &BlockError{Disk: s.id, Off: off, Len: BlockSize, Err: err}
		}
		s.repaired.Add(1)
		if told := s.onRepair.Load(); told != nil {
			(*told)(off)
		}
	}
	return nil
}

// Damage counts, since Open: blocks found bad (each time), and blocks repaired.
func (s *Store) Damage() (found, repaired int64) { return s.badBlocks.Load(), s.repaired.Load() }

// ReadStable reads a range while no write is under way in it, and calls then
// before the next one may begin: what then sends is in order with the writes.
func (s *Store) ReadStable(p []byte, off int64, then func() error) error {
	if err := s.check(off, int64(len(p))); err != nil {
		return err
	}
	if off%BlockSize != 0 || len(p)%BlockSize != 0 {
		return fmt.Errorf("read %d bytes at %d of %s: not whole blocks: %w", len(p), off, s.id, syscall.EINVAL)
	}
	l := s.lockBlocks(off, int64(len(p)))
	defer s.blocks.unlock(l)
	if err := s.readLocked(p, off); err != nil {
		return err
	}
	return then()
}
