package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"drc/internal/object"

	"github.com/minio/minio-go/v7"
)

// failed gives an error of the S3 library the store's vocabulary and says which
// call failed. name may be a prefix or empty.
func (s *Store) failed(ctx context.Context, verb, name string, err error) error {
	return fmt.Errorf("%s %s in %s: %w", verb, name, s.URL(), s.explain(ctx, err))
}

func (s *Store) explain(ctx context.Context, err error) error {
	if ctxErr := ctx.Err(); ctxErr != nil {
		return ctxErr
	}
	// Network errors repeat the whole URL, which the message has already.
	if urlErr, ok := errors.AsType[*url.Error](err); ok {
		err = urlErr.Err
	}
	answer, ok := errors.AsType[minio.ErrorResponse](err)
	if !ok {
		// A connection that ended is not an object that ended.
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			return errors.New("the connection ended in the middle of the answer")
		}
		return err
	}
	said := fmt.Sprintf("the store said %s (%s)", answer.Message, answer.Code)
	if answer.Code == "" {
		said = fmt.Sprintf("the store said %s (status %d)", answer.Message, answer.StatusCode)
	}
	switch answer.Code {
	case minio.NoSuchKey:
		return fmt.Errorf("%w: %s", object.ErrNotFound, said)
	case minio.NoSuchBucket:
		return fmt.Errorf("%w: %s; create the bucket or correct the URL", object.ErrNoBucket, said)
	case minio.InvalidRange:
		return fmt.Errorf("%s: %w", said, io.ErrUnexpectedEOF)
	case "RequestTimeTooSkewed":
		return fmt.Errorf("%s; set this host's clock", said)
	case "AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "InvalidRegion", "IllegalLocationConstraintException":
		if answer.Region != "" {
			return fmt.Errorf("%s; put region=%s into the store's URL", said, answer.Region)
		}
		return fmt.Errorf("%s; put the bucket's region into the store's URL", said)
	case "ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired":
		s.credentials.Expire()
		return fmt.Errorf("%w: %s; renew the credentials", object.ErrDenied, said)
	case "InvalidAccessKeyId", "SignatureDoesNotMatch":
		// The next call reads them again: they may have been replaced.
		s.credentials.Expire()
		return fmt.Errorf("%w: %s; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws/credentials", object.ErrDenied, said)
	}
	switch answer.StatusCode {
	case http.StatusRequestedRangeNotSatisfiable:
		return fmt.Errorf("%s: %w", said, io.ErrUnexpectedEOF)
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w: %s; these credentials lack the permission", object.ErrDenied, said)
	}
	return errors.New(said)
}

// code returns the error code of an S3 answer and its status.
func code(err error) (string, int) {
	answer, _ := errors.AsType[minio.ErrorResponse](err)
	return answer.Code, answer.StatusCode
}
