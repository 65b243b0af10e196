package s3

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"time"

	"drc/internal/object"

	"github.com/minio/minio-go/v7/pkg/credentials"
)

// identityTimeout bounds a question to the host's identity service. Where there
// is none, packets to its address vanish.
const identityTimeout = 5 * time.Second

// chain finds credentials as the tools of AWS do: environment, then files, then,
// for AWS only, the identity of the host. The S3 library serializes its calls.
type chain struct {
	providers []credentials.Provider
	current   credentials.Provider
}

func newCredentials(location Location) *credentials.Credentials {
	c := &chain{providers: []credentials.Provider{&credentials.EnvAWS{}, &credentials.FileAWSCredentials{}}}
	if location.aws() {
		c.providers = append(c.providers, &credentials.IAM{
			Region: location.region(),
			Client: &http.Client{
				Timeout: identityTimeout,
				Transport: &http.Transport{
					Proxy:             http.ProxyFromEnvironment,
					DialContext:       (&net.Dialer{Timeout: identityTimeout / 2}).DialContext,
					DisableKeepAlives: true,
				},
			},
		})
	}
	return credentials.New(c)
}

// RetrieveWithCredContext implements credentials.Provider.
func (c *chain) RetrieveWithCredContext(cc *credentials.CredContext) (credentials.Value, error) {
	c.current = nil
	var problem string
	for _, provider := range c.providers {
		value, err := provider.RetrieveWithCredContext(cc)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			problem = fmt.Sprintf(" (%v)", err)
			if strings.Contains(problem, "delimiter") {
				// The parser quotes the line, which may be a secret.
				problem = " (a line of a credentials file is not of the form key = value)"
			}
		}
		if err == nil && value.AccessKeyID != "" && value.SecretAccessKey != "" {
			c.current = provider
			return value, nil
		}
	}
	return credentials.Value{}, fmt.Errorf("%w: no credentials found%s; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials", object.ErrDenied, problem)
}

// Retrieve implements credentials.Provider.
func (c *chain) Retrieve() (credentials.Value, error) { return c.RetrieveWithCredContext(nil) }

// IsExpired implements credentials.Provider.
func (c *chain) IsExpired() bool { return c.current == nil || c.current.IsExpired() }
