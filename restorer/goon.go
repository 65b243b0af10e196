package restorer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
)

// goOn takes up what an earlier run has done, as far as it is still there: the
// file may be another one by now, or have been written to, and another disk may
// go by the device's name. Regions that are not as they were left are restored
// again; a device of which that is so is overwritten only with Options.Force.
func (r *restore) goOn(ctx context.Context) error {
	if !r.resumed {
		return nil
	}
	changed := 0
	p := make([]byte, regionBytes)
	for region := range int64(len(r.progress.sums)) {
		if !r.progress.isDone(region) {
			r.progress.sums[region] = 0 // of pieces that came too late for the note
			continue
		}
		same, err := r.asLeft(ctx, region, p)
		if err != nil {
			return err
		}
		if !same {
			changed++
			r.progress.unset(region)
			continue
		}
		r.done += r.region(region).Len
	}
	r.earlier = r.done
	if changed > 0 {
		if r.t.device && !r.o.Force {
			return errDeviceChanged
		}
		r.im.history.cfg.Logger.Warn("the target was changed since the restore was interrupted; what was changed is restored again",
			"target", r.t.name, "regions", changed)
	}
	return nil
}

var errDeviceChanged = errors.New("the device is not as the interrupted restore left it, and may hold something else by now: pass --force to overwrite it")

// asLeft reports whether a region of the target holds what an earlier run wrote
// to it.
func (r *restore) asLeft(ctx context.Context, region int64, p []byte) (bool, error) {
	e := r.region(region)
	extents, err := r.im.Extents(ctx, e)
	if err != nil {
		return false, err
	}
	p = p[:e.Len]
	if _, err := r.t.file.ReadAt(p, e.Off); err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("read what an earlier run has restored: %w", err)
	}
	sum := uint32(0)
	end := int64(0)
	for _, x := range extents {
		if x.Zero {
			continue
		}
		from := x.Off - e.Off
		if !isZero(p[end:from]) {
			return false, nil
		}
		end = from + x.Len
		sum ^= pieceSum(p[from:end], x.Off)
	}
	return sum == r.progress.sums[region] && isZero(p[end:]), nil
}

func isZero(p []byte) bool {
	for len(p) > zeroChunk {
		if !bytes.Equal(p[:zeroChunk], zeroes[:]) {
			return false
		}
		p = p[zeroChunk:]
	}
	return bytes.Equal(p, zeroes[:len(p)])
}
