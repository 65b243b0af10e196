package s3

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"net/http"
	"slices"
	"strings"
	"time"

	"drc/internal/object"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

const checksumHeader = "x-amz-checksum-crc32c"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Options of Open. Zero fields stand for the values given.
type Options struct {
	Concurrency  int           // connections kept open between requests: 64
	DialTimeout  time.Duration // for a connection, and for its TLS handshake: 10 s
	StallTimeout time.Duration // without any byte moving in either direction: 60 s
}

// Store is an object.Store in a bucket.
type Store struct {
	location    Location
	credentials *credentials.Credentials
	transport   *http.Transport
	client      *minio.Client
	core        minio.Core
}

var _ object.Store = (*Store)(nil)

// Open returns the store at location. It makes no request: what is wrong with
// the bucket or the credentials shows when the store is used.
func Open(location Location, options Options) (*Store, error) {
	if options.Concurrency == 0 {
		options.Concurrency = 64
	}
	if options.DialTimeout == 0 {
		options.DialTimeout = 10 * time.Second
	}
	if options.StallTimeout == 0 {
		options.StallTimeout = 60 * time.Second
	}
	s := &Store{
		location:    location,
		credentials: newCredentials(location),
		transport:   newTransport(options),
	}
	host, secure := location.endpoint()
	client, err := minio.New(host, &minio.Options{
		Creds:     s.credentials,
		Secure:    secure,
		Transport: noter{s.transport},
		// Given, so that the library does not ask the service for it.
		Region: location.region(),
		// Bodies are sent plain; the option only allows checksum headers.
		TrailingHeaders: true,
		MaxRetries:      1,
	})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", location.URL(), err)
	}
	s.client, s.core = client, minio.Core{Client: client}
	return s, nil
}

// URL implements object.Store.
func (s *Store) URL() string { return s.location.URL() }

// Put implements object.Store.
func (s *Store) Put(ctx context.Context, name string, body []byte) (object.Answer, error) {
	if err := object.CheckName(name); err != nil {
		return object.Answer{}, err
	}
	options := minio.PutObjectOptions{
		// Multipart uploads drop the condition.
		DisableMultipart:     true,
		DisableContentSha256: true,
		UserMetadata:         map[string]string{checksumHeader: checksum(body)},
	}
	options.SetMatchETagExcept("*")
	noteCtx, noted := noting(ctx)
	info, err := s.client.PutObject(noteCtx, s.location.Bucket, s.location.key(name), bytes.NewReader(body), int64(len(body)), options)
	if err == nil && info.ETag == "" {
		// Every S3 service names what it stored. A proxy or a login page between
		// here and there answers 200 to anything, and then nothing is stored.
		return object.Answer{}, fmt.Errorf("put %s in %s: the answer is a success without an ETag, so it is not an S3 service's: see what stands between this host and the endpoint", name, s.URL())
	}
	if err == nil {
		return object.Answer{Date: noted.date}, nil
	}
	switch code, status := code(err); {
	case status == http.StatusPreconditionFailed:
		return s.compare(ctx, name, body)
	case status == http.StatusConflict:
		return object.Answer{}, fmt.Errorf("put %s in %s: another put of the same name was under way (%s); put it again", name, s.URL(), code)
	case status == http.StatusNotImplemented || code == "NotImplemented":
		return object.Answer{}, fmt.Errorf("put %s in %s: %w: it refuses conditional puts (If-None-Match): %w", name, s.URL(), object.ErrUnsupported, err)
	case code == minio.NoSuchKey:
		// A put that finds no object cannot mean that; the callers of Put do not
		// expect ErrNotFound.
		return object.Answer{}, fmt.Errorf("put %s in %s: %s", name, s.URL(), err.Error())
	}
	return object.Answer{}, s.failed(ctx, "put", name, err)
}

// compare decides about a Put whose name is taken. The object may be this Put's
// own: an answer was lost and the request repeated, here or by the caller.
func (s *Store) compare(ctx context.Context, name string, body []byte) (object.Answer, error) {
	there, answer, err := s.Get(ctx, name, int64(len(body)), nil)
	switch {
	case errors.Is(err, object.ErrTooLarge), err == nil && !bytes.Equal(there, body):
		return object.Answer{}, fmt.Errorf("put %s in %s: %w", name, s.URL(), object.ErrExists)
	case errors.Is(err, object.ErrNotFound):
		return object.Answer{}, fmt.Errorf("put %s in %s: the name was taken, but then the object was gone; put it again", name, s.URL())
	case err != nil:
		return object.Answer{}, fmt.Errorf("put %s in %s: the name is taken, but comparing failed: %w", name, s.URL(), err)
	}
	return answer, nil
}

// Get implements object.Store.
func (s *Store) Get(ctx context.Context, name string, limit int64, dst []byte) ([]byte, object.Answer, error) {
	if err := object.CheckName(name); err != nil {
		return dst, object.Answer{}, err
	}
	var options minio.GetObjectOptions
	options.Set("x-amz-checksum-mode", "ENABLED")
	noteCtx, noted := noting(ctx)
	stream, info, header, err := s.core.GetObject(noteCtx, s.location.Bucket, s.location.key(name), options)
	if err != nil {
		return dst, object.Answer{}, s.failed(ctx, "get", name, err)
	}
	defer stream.Close()
	if info.Size < 0 {
		return dst, object.Answer{}, fmt.Errorf("get %s in %s: the store's answer has no length", name, s.URL())
	}
	if info.Size > limit {
		return dst, object.Answer{}, fmt.Errorf("get %s in %s: %w: %d bytes, the limit is %d", name, s.URL(), object.ErrTooLarge, info.Size, limit)
	}
	body, err := read(stream, info.Size, dst)
	if err != nil {
		return dst, object.Answer{}, s.failed(ctx, "get", name, err)
	}
	// Objects that other tools put there may have none, or one of parts.
	if want := header.Get(checksumHeader); want != "" && !strings.Contains(want, "-") {
		if got := checksum(body[len(dst):]); got != want {
			return dst, object.Answer{}, fmt.Errorf("get %s in %s: the bytes were damaged on their way or in the store: CRC32C is %s, should be %s", name, s.URL(), got, want)
		}
	}
	return body, object.Answer{Date: noted.date}, nil
}

// GetRange implements object.Store.
func (s *Store) GetRange(ctx context.Context, name string, off, n int64, dst []byte) ([]byte, error) {
	if err := object.CheckName(name); err != nil {
		return dst, err
	}
	if err := object.CheckRange(name, off, n); err != nil {
		return dst, err
	}
	if n == 0 {
		// HTTP has no empty ranges.
		info, err := s.Stat(ctx, name)
		if err == nil && off > info.Size {
			err = s.beyond(name, off, n, info.Size)
		}
		return dst, err
	}
	var options minio.GetObjectOptions
	// Not SetRange, which takes the first byte alone for a range without end.
	options.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	noteCtx, noted := noting(ctx)
	stream, info, header, err := s.core.GetObject(noteCtx, s.location.Bucket, s.location.key(name), options)
	if err != nil {
		return dst, s.failed(ctx, "read", name, err)
	}
	defer stream.Close()
	if noted.status != http.StatusPartialContent {
		// The whole object is fine if that is what was asked for.
		if info.Size >= 0 && off+n > info.Size {
			return dst, s.beyond(name, off, n, info.Size)
		}
		if off != 0 || info.Size != n {
			return dst, fmt.Errorf("read %s in %s: %w: it ignores the range of a read (status %d)", name, s.URL(), object.ErrUnsupported, noted.status)
		}
	} else {
		var first, last, size int64
		if _, err := fmt.Sscanf(header.Get("Content-Range"), "bytes %d-%d/%d", &first, &last, &size); err != nil {
			return dst, fmt.Errorf("read %s in %s: the store answered with the range %q", name, s.URL(), header.Get("Content-Range"))
		}
		if off+n > size {
			return dst, s.beyond(name, off, n, size)
		}
		if first != off || last != off+n-1 {
			return dst, fmt.Errorf("read %s in %s: asked for bytes %d-%d, the store answered with %d-%d", name, s.URL(), off, off+n-1, first, last)
		}
		if info.Size != n {
			return dst, fmt.Errorf("read %s in %s: asked for %d bytes, the store announced %d", name, s.URL(), n, info.Size)
		}
	}
	body, err := read(stream, n, dst)
	if err != nil {
		return dst, s.failed(ctx, "read", name, err)
	}
	return body, nil
}

// Stat implements object.Store.
func (s *Store) Stat(ctx context.Context, name string) (object.Info, error) {
	if err := object.CheckName(name); err != nil {
		return object.Info{}, err
	}
	info, err := s.client.StatObject(ctx, s.location.Bucket, s.location.key(name), minio.StatObjectOptions{})
	if err == nil {
		return object.Info{Name: name, Size: info.Size}, nil
	}
	if code, _ := code(err); code == minio.NoSuchKey {
		// The answer to HEAD has no body that could tell a missing object from a
		// missing bucket. Where the question is not allowed, it is the object.
		if there, bucketErr := s.client.BucketExists(ctx, s.location.Bucket); bucketErr == nil && !there {
			return object.Info{}, fmt.Errorf("look up %s in %s: %w; create the bucket or correct the URL", name, s.URL(), object.ErrNoBucket)
		}
	}
	return object.Info{}, s.failed(ctx, "look up", name, err)
}

// List implements object.Store. It asks for a thousand objects at a time.
func (s *Store) List(ctx context.Context, prefix, after string) iter.Seq2[object.Info, error] {
	return func(yield func(object.Info, error) bool) {
		if err := object.CheckPrefix(prefix); err != nil {
			yield(object.Info{}, err)
			return
		}
		options := minio.ListObjectsOptions{Prefix: s.location.key(prefix), Recursive: true, FetchOwner: new(bool)}
		if after != "" {
			options.StartAfter = s.location.key(after)
		}
		last := after
		for found := range s.client.ListObjectsIter(ctx, s.location.Bucket, options) {
			if found.Err != nil {
				yield(object.Info{}, s.failed(ctx, "list", prefix, found.Err))
				return
			}
			name, ok := s.location.name(found.Key)
			if !ok || !strings.HasPrefix(name, prefix) {
				continue
			}
			if name <= last {
				yield(object.Info{}, fmt.Errorf("list %s in %s: %w: it lists %s behind %s, not in bytewise order", prefix, s.URL(), object.ErrUnsupported, name, last))
				return
			}
			last = name
			if !yield(object.Info{Name: name, Size: found.Size}, nil) {
				return
			}
		}
		// The library ends a listing silently when the context ends.
		if ctx.Err() != nil {
			yield(object.Info{}, s.failed(ctx, "list", prefix, ctx.Err()))
		}
	}
}

// ListDirs implements object.Store.
func (s *Store) ListDirs(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if err := object.CheckDirPrefix(prefix); err != nil {
			yield("", err)
			return
		}
		options := minio.ListObjectsOptions{Prefix: s.location.key(prefix), FetchOwner: new(bool)}
		var dirs []string
		for found := range s.client.ListObjectsIter(ctx, s.location.Bucket, options) {
			if found.Err != nil {
				yield("", s.failed(ctx, "list", prefix, found.Err))
				return
			}
			folder, isDir := strings.CutSuffix(found.Key, "/")
			if name, ok := s.location.name(folder); ok && isDir && strings.HasPrefix(name, prefix) {
				dirs = append(dirs, name[len(prefix):])
			}
		}
		if ctx.Err() != nil {
			yield("", s.failed(ctx, "list", prefix, ctx.Err()))
			return
		}
		// The service sorts them with their slash, which is another order: "a/"
		// comes behind "a.b/".
		slices.Sort(dirs)
		for _, element := range slices.Compact(dirs) {
			if !yield(element, nil) {
				return
			}
		}
	}
}

// Delete implements object.Store. In a bucket with versions the object stays as
// an old version.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := object.CheckName(name); err != nil {
		return err
	}
	err := s.client.RemoveObject(ctx, s.location.Bucket, s.location.key(name), minio.RemoveObjectOptions{})
	if err == nil {
		return nil
	}
	if err := s.failed(ctx, "delete", name, err); !errors.Is(err, object.ErrNotFound) {
		return err
	}
	return nil
}

// Close implements object.Store.
func (s *Store) Close() error {
	s.transport.CloseIdleConnections()
	return nil
}

func (s *Store) beyond(name string, off, n, size int64) error {
	return fmt.Errorf("read %s in %s: %d bytes from %d: the object has %d bytes: %w", name, s.URL(), n, off, size, io.ErrUnexpectedEOF)
}

// read appends exactly n bytes of stream to dst.
func read(stream io.Reader, n int64, dst []byte) ([]byte, error) {
	start := len(dst)
	dst = slices.Grow(dst, int(n))[:start+int(n)]
	_, err := io.ReadFull(stream, dst[start:])
	return dst, err
}

// checksum returns the CRC32C in the form of its header.
func checksum(body []byte) string {
	return base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.Checksum(body, castagnoli)))
}
