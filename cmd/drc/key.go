package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"drc/internal/crypt"
)

func keyCommand(g *global) *cobra.Command {
	c := &cobra.Command{
		Use:   "key",
		Short: "Make keys for hosts that shall write and not read",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	agent := &cobra.Command{
		Use:   "agent FILE",
		Short: "Write an agent key: it extends history and cannot read content",
		Long: `Make an agent key and certify it with the identity. A host that has only this
key can protect its volumes, restart, and compare, but never read what is
stored: restore needs the identity.`,
		Example: `  drc key agent web1.key --identity drc.id
  drc agent --agent-key web1.key --volume name=data,path=/dev/sdb1`,
		Args: exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			if g.identity == "" {
				return usage("certifying an agent key needs the identity: pass --identity FILE")
			}
			id, err := readIdentity(g.identity)
			if err != nil {
				return err
			}
			if !id.CanSign() {
				return usage("%s has no root secret: use the identity that drc init wrote", g.identity)
			}
			a, err := crypt.NewAgent(id.Root, time.Now().UnixNano())
			if err != nil {
				return err
			}
			if err := writeSecret(args[0], a.EncodeFile(id.RootPublic)); err != nil {
				return err
			}
			fmt.Fprintf(g.out, "agent key %s\n", a.Cert.Agent)
			return nil
		},
	}
	c.AddCommand(agent)
	return c
}
