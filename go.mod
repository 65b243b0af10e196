module drc

go 1.26
