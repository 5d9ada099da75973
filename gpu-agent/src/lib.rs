//! Trains trials on the devices of one machine.
